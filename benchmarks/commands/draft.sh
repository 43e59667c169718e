# DRaFT on the zoo: LV, one step, several, and AlignProp's random number of them.
#
# python -m benchmarks.run benchmarks/commands/draft.sh --seeds 0 1 2 --jobs 2

python draft.py zoo --seed $SEED \
    --output-dir runs/benchmark-learning/draft__lv__$SEED

python draft.py zoo --num-noise 0 --seed $SEED \
    --output-dir runs/benchmark-learning/draft__1__$SEED

python draft.py zoo --num-noise 0 --truncate 4 --seed $SEED \
    --output-dir runs/benchmark-learning/draft__4__$SEED

python draft.py zoo --num-noise 0 --truncate 12 --random-truncate --seed $SEED \
    --output-dir runs/benchmark-learning/draft__alignprop__$SEED
