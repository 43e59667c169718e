# ReFL on the zoo: with the pre-training loss, and without, as it was released.
#
# python -m benchmarks.run benchmarks/commands/refl.sh --seeds 0 1 2 --jobs 2

python refl.py zoo --seed $SEED \
    --output-dir runs/benchmark-learning/refl__$SEED

python refl.py zoo --pretrain-beta 0 --seed $SEED \
    --output-dir runs/benchmark-learning/refl__without-the-pre-training-loss__$SEED
