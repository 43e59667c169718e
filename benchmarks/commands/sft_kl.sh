# The table and the curves of docs/sft_kl.md: the paper's four prompts, four forms of the loss.
#
# python -m benchmarks.run benchmarks/commands/sft_kl.sh --seeds 0 1 2 --jobs 2
# python -m benchmarks.report sft_kl
#
# The runs of a prompt and seed learn from the same samples, which the first of them draws.

python sft_kl.py zoo --regularization kl-o --prompt "A green colored rabbit" --seed $SEED \
    --dataset runs/benchmark-learning/data__a-green-colored-rabbit__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-o__a-green-colored-rabbit__$SEED
python sft_kl.py zoo --regularization kl-d --prompt "A green colored rabbit" --seed $SEED \
    --dataset runs/benchmark-learning/data__a-green-colored-rabbit__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-d__a-green-colored-rabbit__$SEED
python sft_kl.py zoo --regularization none --prompt "A green colored rabbit" --seed $SEED \
    --dataset runs/benchmark-learning/data__a-green-colored-rabbit__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__none__a-green-colored-rabbit__$SEED
python sft_kl.py zoo --regularization kl-o --filter drop --prompt "A green colored rabbit" \
    --seed $SEED \
    --dataset runs/benchmark-learning/data__a-green-colored-rabbit__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-o,-drop__a-green-colored-rabbit__$SEED

python sft_kl.py zoo --regularization kl-o --prompt "A cat and a dog" --seed $SEED \
    --dataset runs/benchmark-learning/data__a-cat-and-a-dog__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-o__a-cat-and-a-dog__$SEED
python sft_kl.py zoo --regularization kl-d --prompt "A cat and a dog" --seed $SEED \
    --dataset runs/benchmark-learning/data__a-cat-and-a-dog__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-d__a-cat-and-a-dog__$SEED
python sft_kl.py zoo --regularization none --prompt "A cat and a dog" --seed $SEED \
    --dataset runs/benchmark-learning/data__a-cat-and-a-dog__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__none__a-cat-and-a-dog__$SEED
python sft_kl.py zoo --regularization kl-o --filter drop --prompt "A cat and a dog" --seed $SEED \
    --dataset runs/benchmark-learning/data__a-cat-and-a-dog__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-o,-drop__a-cat-and-a-dog__$SEED

python sft_kl.py zoo --regularization kl-o --prompt "Four wolves in the park" --seed $SEED \
    --dataset runs/benchmark-learning/data__four-wolves-in-the-park__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-o__four-wolves-in-the-park__$SEED
python sft_kl.py zoo --regularization kl-d --prompt "Four wolves in the park" --seed $SEED \
    --dataset runs/benchmark-learning/data__four-wolves-in-the-park__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-d__four-wolves-in-the-park__$SEED
python sft_kl.py zoo --regularization none --prompt "Four wolves in the park" --seed $SEED \
    --dataset runs/benchmark-learning/data__four-wolves-in-the-park__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__none__four-wolves-in-the-park__$SEED
python sft_kl.py zoo --regularization kl-o --filter drop --prompt "Four wolves in the park" \
    --seed $SEED \
    --dataset runs/benchmark-learning/data__four-wolves-in-the-park__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-o,-drop__four-wolves-in-the-park__$SEED

python sft_kl.py zoo --regularization kl-o --prompt "A dog on the moon" --seed $SEED \
    --dataset runs/benchmark-learning/data__a-dog-on-the-moon__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-o__a-dog-on-the-moon__$SEED
python sft_kl.py zoo --regularization kl-d --prompt "A dog on the moon" --seed $SEED \
    --dataset runs/benchmark-learning/data__a-dog-on-the-moon__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-d__a-dog-on-the-moon__$SEED
python sft_kl.py zoo --regularization none --prompt "A dog on the moon" --seed $SEED \
    --dataset runs/benchmark-learning/data__a-dog-on-the-moon__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__none__a-dog-on-the-moon__$SEED
python sft_kl.py zoo --regularization kl-o --filter drop --prompt "A dog on the moon" \
    --seed $SEED \
    --dataset runs/benchmark-learning/data__a-dog-on-the-moon__$SEED \
    --output-dir runs/benchmark-learning/sft_kl__kl-o,-drop__a-dog-on-the-moon__$SEED
