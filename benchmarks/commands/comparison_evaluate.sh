# Judges the runs of comparison.sh and comparison_any_reward.sh on prompts that they have not seen.
#
# python -m benchmarks.run benchmarks/commands/comparison_evaluate.sh --jobs 2

python evaluate.py zoo --prompts-file prompts/zoo_preference_held_out.txt --images-per-prompt 16 \
    --rewards image_reward:zoo/image_reward benchmarks/zoo_rewards.py:colours \
    --lora runs/benchmark-comparison/equal_time/*__preference__* \
    --output-dir runs/benchmark-comparison/evaluations/equal_time

python evaluate.py zoo --prompts-file prompts/zoo_preference_held_out.txt --images-per-prompt 16 \
    --rewards image_reward:zoo/image_reward benchmarks/zoo_rewards.py:colours \
    --lora runs/benchmark-comparison/equal_queries/*__preference__* \
    --output-dir runs/benchmark-comparison/evaluations/equal_queries

python evaluate.py zoo --prompts-file prompts/zoo_preference_held_out.txt --images-per-prompt 16 \
    --rewards image_reward:zoo/image_reward benchmarks/zoo_rewards.py:colours \
    --lora runs/benchmark-comparison/longer/*__preference__* \
    --output-dir runs/benchmark-comparison/evaluations/longer

python evaluate.py zoo --prompts-file prompts/zoo_composition_held_out.txt --images-per-prompt 4 \
    --rewards object_detection:zoo/detector image_reward:zoo/image_reward \
    --lora runs/benchmark-comparison/composition/*__composition__* \
    --output-dir runs/benchmark-comparison/evaluations/composition

# Parity is of the 64 pictures of a prompt.

python evaluate.py zoo --prompts-file prompts/zoo_portraits_held_out.txt --images-per-prompt 64 \
    --rewards statistical_parity:zoo/skin_tone image_reward:zoo/image_reward \
    --lora runs/benchmark-comparison/portraits/*__portraits__* \
    --output-dir runs/benchmark-comparison/evaluations/portraits
