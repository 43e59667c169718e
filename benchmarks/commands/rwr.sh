# The table and the curves of docs/rwr.md: three rewards, two forms of the weights.
#
# python -m benchmarks.run benchmarks/commands/rwr.sh --seeds 0 1 2 --jobs 2
# python -m benchmarks.report rwr

# The rewards' standard deviation within a prompt is 0.4 kB, where the preset is for 1.

python rwr.py zoo --weights softmax --reward jpeg_compressibility --inverse-temperature 12 \
    --seed $SEED \
    --output-dir runs/benchmark-learning/rwr__softmax__jpeg_compressibility__$SEED

# Which 12 and the preset's learning rate of 2e-3 do not move.

python rwr.py zoo --weights softmax --reward jpeg_incompressibility --inverse-temperature 30 \
    --learning-rate 5e-3 --seed $SEED \
    --output-dir runs/benchmark-learning/rwr__softmax__jpeg_incompressibility__$SEED

# The preset.

python rwr.py zoo --weights softmax --reward image_reward:zoo/image_reward --seed $SEED \
    --output-dir runs/benchmark-learning/rwr__softmax__image_reward-zoo-image_reward__$SEED

# Sparse weights have no temperature.

python rwr.py zoo --weights sparse --reward jpeg_compressibility --seed $SEED \
    --output-dir runs/benchmark-learning/rwr__sparse__jpeg_compressibility__$SEED

python rwr.py zoo --weights sparse --reward jpeg_incompressibility --seed $SEED \
    --output-dir runs/benchmark-learning/rwr__sparse__jpeg_incompressibility__$SEED

python rwr.py zoo --weights sparse --reward image_reward:zoo/image_reward --seed $SEED \
    --output-dir runs/benchmark-learning/rwr__sparse__image_reward-zoo-image_reward__$SEED
