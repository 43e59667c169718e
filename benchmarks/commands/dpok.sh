# The figures of docs/dpok.md: the paper's four prompts, 80 iterations of the preset.
#
# python -m benchmarks.run benchmarks/commands/dpok.sh --seeds 0 1 2 --jobs 2
# python -m benchmarks.report dpok

python dpok.py zoo --prompt "A green colored rabbit" --seed $SEED \
    --output-dir runs/benchmark-dpok/a-green-colored-rabbit__$SEED

python dpok.py zoo --prompt "A cat and a dog" --seed $SEED \
    --output-dir runs/benchmark-dpok/a-cat-and-a-dog__$SEED

python dpok.py zoo --prompt "Four wolves in the park" --seed $SEED \
    --output-dir runs/benchmark-dpok/four-wolves-in-the-park__$SEED

python dpok.py zoo --prompt "A dog on the moon" --seed $SEED \
    --output-dir runs/benchmark-dpok/a-dog-on-the-moon__$SEED
