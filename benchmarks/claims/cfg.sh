# Claim 10 of benchmarks/claims/README.md: five rounds of sparse RWR on image reward, 192 samples
# each, with and without guidance in training; samples are drawn with guidance in both.
#
# python -m benchmarks.run benchmarks/claims/cfg.sh --seeds 0 1 2 --jobs 2

python rwr.py zoo --weights sparse --learning-rate 4e-3 --seed $SEED \
    --output-dir runs/claims-cfg/with__$SEED

python rwr.py zoo --weights sparse --learning-rate 4e-3 --no-cfg-training --seed $SEED \
    --output-dir runs/claims-cfg/without__$SEED
