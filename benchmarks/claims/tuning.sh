# The tuning of benchmarks/claims/README.md for claims 1 to 8 and 10: three learning rates a method,
# on the rabbit, and sparse RWR on the ten prompts of prompts/zoo.txt, with seed 3, which counts
# nowhere.
#
# python -m benchmarks.run benchmarks/claims/tuning.sh --seeds 3 --jobs 2

python dpok.py zoo --prompt "A green colored rabbit" \
    --num-iterations 40 --learning-rate 1e-3 --seed $SEED \
    --output-dir runs/claims-tuning/dpok-1e-3__$SEED

python dpok.py zoo --prompt "A green colored rabbit" \
    --num-iterations 40 --learning-rate 2e-3 --seed $SEED \
    --output-dir runs/claims-tuning/dpok-2e-3__$SEED

python dpok.py zoo --prompt "A green colored rabbit" \
    --num-iterations 40 --learning-rate 4e-3 --seed $SEED \
    --output-dir runs/claims-tuning/dpok-4e-3__$SEED

python sft_kl.py zoo --prompt "A green colored rabbit" --regularization none \
    --dataset-size 960 --num-iterations 10 --learning-rate 5e-4 --seed $SEED \
    --output-dir runs/claims-tuning/sft-5e-4__$SEED

python sft_kl.py zoo --prompt "A green colored rabbit" --regularization none \
    --dataset-size 960 --num-iterations 10 --learning-rate 1e-3 --seed $SEED \
    --output-dir runs/claims-tuning/sft-1e-3__$SEED

python sft_kl.py zoo --prompt "A green colored rabbit" --regularization none \
    --dataset-size 960 --num-iterations 10 --learning-rate 2e-3 --seed $SEED \
    --output-dir runs/claims-tuning/sft-2e-3__$SEED

python rwr.py zoo --weights sparse --learning-rate 1e-3 --seed $SEED \
    --output-dir runs/claims-tuning/rwr-sparse-1e-3__$SEED

python rwr.py zoo --weights sparse --learning-rate 2e-3 --seed $SEED \
    --output-dir runs/claims-tuning/rwr-sparse-2e-3__$SEED

python rwr.py zoo --weights sparse --learning-rate 4e-3 --seed $SEED \
    --output-dir runs/claims-tuning/rwr-sparse-4e-3__$SEED
