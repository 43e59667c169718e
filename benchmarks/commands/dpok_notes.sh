# The figures of docs/notes/dpok.md, whose seconds are of a run alone, but for those in bfloat16.
#
# python -m benchmarks.run benchmarks/commands/dpok_notes.sh --seeds 0 1 2
# python -m benchmarks.report NAME     what follows "benchmark-" in --output-dir

# Fewer iterations for the rabbit; the README's command is that with 20.

python dpok.py zoo --prompt "A green colored rabbit" --num-iterations 20 --seed $SEED \
    --output-dir runs/benchmark-dpok_20/a-green-colored-rabbit__$SEED

python dpok.py zoo --prompt "A green colored rabbit" --num-iterations 30 --seed $SEED \
    --output-dir runs/benchmark-dpok_30/a-green-colored-rabbit__$SEED

python dpok.py zoo --prompt "A green colored rabbit" --num-iterations 40 --seed $SEED \
    --output-dir runs/benchmark-dpok_40/a-green-colored-rabbit__$SEED

# The README's command with the UNet in bfloat16.

python dpok.py zoo --prompt "A green colored rabbit" --num-iterations 20 --dtype bf16 \
    --seed $SEED --output-dir runs/benchmark-dpok_bf16/a-green-colored-rabbit__$SEED

# Fewer iterations for the other prompts.

python dpok.py zoo --prompt "A cat and a dog" --num-iterations 40 --seed $SEED \
    --output-dir runs/benchmark-dpok_40_pair_moon/a-cat-and-a-dog__$SEED

python dpok.py zoo --prompt "A dog on the moon" --num-iterations 40 --seed $SEED \
    --output-dir runs/benchmark-dpok_40_pair_moon/a-dog-on-the-moon__$SEED

python dpok.py zoo --prompt "Four wolves in the park" --num-iterations 40 --seed $SEED \
    --output-dir runs/benchmark-dpok_40_wolves/four-wolves-in-the-park__$SEED

# Four times the weight of the KL, on one seed.

python dpok.py zoo --prompt "A cat and a dog" --num-iterations 40 --beta 0.4 --seed 0 \
    --output-dir runs/benchmark-dpok_beta/a-cat-and-a-dog__0

python dpok.py zoo --prompt "A dog on the moon" --num-iterations 40 --beta 0.4 --seed 0 \
    --output-dir runs/benchmark-dpok_beta/a-dog-on-the-moon__0

python dpok.py zoo --prompt "A green colored rabbit" --num-iterations 40 --beta 0.4 --seed 0 \
    --output-dir runs/benchmark-dpok_beta/a-green-colored-rabbit__0
