# Tables 3 and 4 of docs/comparison.md: composition and parity, for the methods that take any
# reward. Each trains as long as the others, about seven minutes on one core.
#
# python -m benchmarks.run benchmarks/commands/comparison_any_reward.sh --seeds 0 1 2 --jobs 2

python large_scale_ppo.py zoo \
    --tasks "object_detection:zoo/detector prompts/zoo_composition.txt 16x2" \
    --num-iterations 68 --seed $SEED \
    --output-dir runs/benchmark-comparison/composition/large_scale_ppo__composition__$SEED

python raft.py zoo \
    --prompts-file prompts/zoo_composition.txt --reward object_detection:zoo/detector \
    --num-iterations 22 --seed $SEED \
    --output-dir runs/benchmark-comparison/composition/raft__composition__$SEED

python reward_weighted.py zoo \
    --prompts-file prompts/zoo_composition.txt --reward object_detection:zoo/detector \
    --num-iterations 12 --seed $SEED \
    --output-dir runs/benchmark-comparison/composition/reward_weighted__composition__$SEED

python large_scale_ppo.py zoo \
    --tasks "statistical_parity:zoo/skin_tone prompts/zoo_portraits.txt 24x2" \
    --num-iterations 46 --seed $SEED \
    --output-dir runs/benchmark-comparison/portraits/large_scale_ppo__portraits__$SEED

# One reward for the four pictures of a prompt: the best eighth of these sets is learned from.

python raft.py zoo \
    --prompts-file prompts/zoo_portraits.txt --reward statistical_parity:zoo/skin_tone \
    --images-per-prompt 4 --ranking global \
    --num-iterations 22 --seed $SEED \
    --output-dir runs/benchmark-comparison/portraits/raft__portraits__$SEED

python reward_weighted.py zoo \
    --prompts-file prompts/zoo_portraits.txt --reward statistical_parity:zoo/skin_tone \
    --images-per-prompt 4 --watched-prompts 4 \
    --num-iterations 12 --seed $SEED \
    --output-dir runs/benchmark-comparison/portraits/reward_weighted__portraits__$SEED
