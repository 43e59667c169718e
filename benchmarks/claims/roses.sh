# Claim 5 of benchmarks/claims/README.md: DPOK with 960 samples of "Four roses".
#
# python -m benchmarks.run benchmarks/claims/roses.sh --seeds 0 1 2 --jobs 2

python dpok.py zoo --prompt "Four roses" --num-iterations 40 --seed $SEED \
    --output-dir runs/claims-roses/dpok__$SEED
