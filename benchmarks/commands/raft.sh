# The preset of raft.py on the zoo.
#
# python -m benchmarks.run benchmarks/commands/raft.sh --seeds 0 1 2 --jobs 2

python raft.py zoo --seed $SEED --output-dir runs/benchmark-raft/zoo__$SEED
