# Claims 1b and 2b of benchmarks/claims/README.md: SFT with KL-O at the paper's gamma, from the
# samples of the runs without it, which single.sh makes first.
#
# python -m benchmarks.run benchmarks/claims/single_kl_o.sh --seeds 0 1 2 --jobs 2

python sft_kl.py zoo --prompt "A green colored rabbit" --regularization kl-o --gamma 2 \
    --dataset-size 960 --num-iterations 10 --seed $SEED \
    --dataset runs/claims-single/sft__a-green-colored-rabbit__$SEED/dataset \
    --output-dir runs/claims-single/sft-kl-o__a-green-colored-rabbit__$SEED

python sft_kl.py zoo --prompt "A cat and a dog" --regularization kl-o --gamma 2 \
    --dataset-size 960 --num-iterations 10 --seed $SEED \
    --dataset runs/claims-single/sft__a-cat-and-a-dog__$SEED/dataset \
    --output-dir runs/claims-single/sft-kl-o__a-cat-and-a-dog__$SEED

python sft_kl.py zoo --prompt "Four wolves in the park" --regularization kl-o --gamma 2 \
    --dataset-size 960 --num-iterations 10 --seed $SEED \
    --dataset runs/claims-single/sft__four-wolves-in-the-park__$SEED/dataset \
    --output-dir runs/claims-single/sft-kl-o__four-wolves-in-the-park__$SEED

python sft_kl.py zoo --prompt "A dog on the moon" --regularization kl-o --gamma 2 \
    --dataset-size 960 --num-iterations 10 --seed $SEED \
    --dataset runs/claims-single/sft__a-dog-on-the-moon__$SEED/dataset \
    --output-dir runs/claims-single/sft-kl-o__a-dog-on-the-moon__$SEED
