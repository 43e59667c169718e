# Claims 1a, 2a, 3, 6 and 8 of benchmarks/claims/README.md: DPOK, without its KL, without its value
# function, and SFT, each with 960 samples of each of the paper's four prompts.
#
# python -m benchmarks.run benchmarks/claims/single.sh --seeds 0 1 2 --jobs 2

python dpok.py zoo --prompt "A green colored rabbit" \
    --num-iterations 40 --seed $SEED \
    --output-dir runs/claims-single/dpok__a-green-colored-rabbit__$SEED

python dpok.py zoo --prompt "A green colored rabbit" \
    --num-iterations 40 --beta 0 --seed $SEED \
    --output-dir runs/claims-single/dpok-without-kl__a-green-colored-rabbit__$SEED

python dpok.py zoo --prompt "A green colored rabbit" \
    --num-iterations 40 --no-value-function --seed $SEED \
    --output-dir runs/claims-single/dpok-without-value__a-green-colored-rabbit__$SEED

python sft_kl.py zoo --prompt "A green colored rabbit" --regularization none \
    --dataset-size 960 --num-iterations 10 --seed $SEED \
    --output-dir runs/claims-single/sft__a-green-colored-rabbit__$SEED

python dpok.py zoo --prompt "A cat and a dog" \
    --num-iterations 40 --seed $SEED \
    --output-dir runs/claims-single/dpok__a-cat-and-a-dog__$SEED

python dpok.py zoo --prompt "A cat and a dog" \
    --num-iterations 40 --beta 0 --seed $SEED \
    --output-dir runs/claims-single/dpok-without-kl__a-cat-and-a-dog__$SEED

python dpok.py zoo --prompt "A cat and a dog" \
    --num-iterations 40 --no-value-function --seed $SEED \
    --output-dir runs/claims-single/dpok-without-value__a-cat-and-a-dog__$SEED

python sft_kl.py zoo --prompt "A cat and a dog" --regularization none \
    --dataset-size 960 --num-iterations 10 --seed $SEED \
    --output-dir runs/claims-single/sft__a-cat-and-a-dog__$SEED

python dpok.py zoo --prompt "Four wolves in the park" \
    --num-iterations 40 --seed $SEED \
    --output-dir runs/claims-single/dpok__four-wolves-in-the-park__$SEED

python dpok.py zoo --prompt "Four wolves in the park" \
    --num-iterations 40 --beta 0 --seed $SEED \
    --output-dir runs/claims-single/dpok-without-kl__four-wolves-in-the-park__$SEED

python dpok.py zoo --prompt "Four wolves in the park" \
    --num-iterations 40 --no-value-function --seed $SEED \
    --output-dir runs/claims-single/dpok-without-value__four-wolves-in-the-park__$SEED

python sft_kl.py zoo --prompt "Four wolves in the park" --regularization none \
    --dataset-size 960 --num-iterations 10 --seed $SEED \
    --output-dir runs/claims-single/sft__four-wolves-in-the-park__$SEED

python dpok.py zoo --prompt "A dog on the moon" \
    --num-iterations 40 --seed $SEED \
    --output-dir runs/claims-single/dpok__a-dog-on-the-moon__$SEED

python dpok.py zoo --prompt "A dog on the moon" \
    --num-iterations 40 --beta 0 --seed $SEED \
    --output-dir runs/claims-single/dpok-without-kl__a-dog-on-the-moon__$SEED

python dpok.py zoo --prompt "A dog on the moon" \
    --num-iterations 40 --no-value-function --seed $SEED \
    --output-dir runs/claims-single/dpok-without-value__a-dog-on-the-moon__$SEED

python sft_kl.py zoo --prompt "A dog on the moon" --regularization none \
    --dataset-size 960 --num-iterations 10 --seed $SEED \
    --output-dir runs/claims-single/sft__a-dog-on-the-moon__$SEED
