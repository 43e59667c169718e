# The table and the curves of docs/ddpo.md: three rewards, two estimators.
#
# python -m benchmarks.run benchmarks/commands/ddpo.sh --seeds 0 1 2 --jobs 2
# python -m benchmarks.report ddpo

# JPEG sizes bear larger steps than the preset's.

python ddpo.py zoo --estimator is --reward jpeg_compressibility \
    --learning-rate 5e-3 --num-iterations 30 --gradient-steps 4 --seed $SEED \
    --output-dir runs/benchmark-learning/ddpo__is__jpeg_compressibility__$SEED

python ddpo.py zoo --estimator is --reward jpeg_incompressibility \
    --learning-rate 5e-3 --num-iterations 30 --gradient-steps 4 --seed $SEED \
    --output-dir runs/benchmark-learning/ddpo__is__jpeg_incompressibility__$SEED

# The preset.

python ddpo.py zoo --estimator is --reward image_reward:zoo/image_reward --seed $SEED \
    --output-dir runs/benchmark-learning/ddpo__is__image_reward-zoo-image_reward__$SEED

# The score function makes one update an iteration, and takes larger steps.

python ddpo.py zoo --estimator sf --reward jpeg_compressibility \
    --learning-rate 8e-3 --num-iterations 30 --gradient-steps 4 --seed $SEED \
    --output-dir runs/benchmark-learning/ddpo__sf__jpeg_compressibility__$SEED

python ddpo.py zoo --estimator sf --reward jpeg_incompressibility \
    --learning-rate 8e-3 --num-iterations 30 --gradient-steps 4 --seed $SEED \
    --output-dir runs/benchmark-learning/ddpo__sf__jpeg_incompressibility__$SEED

python ddpo.py zoo --estimator sf --reward image_reward:zoo/image_reward --learning-rate 5e-3 \
    --seed $SEED \
    --output-dir runs/benchmark-learning/ddpo__sf__image_reward-zoo-image_reward__$SEED
