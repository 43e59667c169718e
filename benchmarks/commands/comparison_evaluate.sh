# Judges the runs of comparison.sh on prompts that they have not seen.
#
# python -m benchmarks.run benchmarks/commands/comparison_evaluate.sh --jobs 2

python evaluate.py zoo --prompts-file prompts/zoo_preference_held_out.txt --images-per-prompt 16 \
    --rewards image_reward:zoo/image_reward benchmarks/zoo_rewards.py:kinds \
    --lora runs/benchmark-comparison/equal_time/*__preference__* \
    --output-dir runs/benchmark-comparison/evaluations/equal_time

python evaluate.py zoo --prompts-file prompts/zoo_preference_held_out.txt --images-per-prompt 16 \
    --rewards image_reward:zoo/image_reward benchmarks/zoo_rewards.py:kinds \
    --lora runs/benchmark-comparison/equal_queries/*__preference__* \
    --output-dir runs/benchmark-comparison/evaluations/equal_queries
