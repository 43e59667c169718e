# The preset of reward_weighted.py on the zoo.
#
# python -m benchmarks.run benchmarks/commands/reward_weighted.sh --seeds 0 1 2 --jobs 2

python reward_weighted.py zoo --seed $SEED --output-dir runs/benchmark-reward-weighted/zoo__$SEED
