# The tables of docs/comparison.md: five ways of learning from a reward, on the zoo.
#
# python -m benchmarks.run benchmarks/commands/comparison.sh --seeds 0 1 2 --jobs 2
# python -m benchmarks.run benchmarks/commands/comparison_any_reward.sh --seeds 0 1 2 --jobs 2
# python -m benchmarks.run benchmarks/commands/comparison_evaluate.sh --jobs 2
# python -m benchmarks.comparison
#
# Weights and metrics of a run are copied twice: after 1440 reward queries (DRaFT-LV makes three of
# a sample), and when it has trained as long as the others, about six minutes on one core. RAFT,
# which is said to diverge, goes on three times as long.

python large_scale_ppo.py zoo \
    --tasks "image_reward:zoo/image_reward prompts/zoo_preference.txt 12x3" \
    --num-iterations 40 --seed $SEED \
    --output-dir runs/benchmark-comparison/runs/large_scale_ppo__preference__$SEED \
    && mkdir -p runs/benchmark-comparison/equal_queries/large_scale_ppo__preference__$SEED \
    && (cd runs/benchmark-comparison/runs/large_scale_ppo__preference__$SEED \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors \
            ../../equal_queries/large_scale_ppo__preference__$SEED \
        && mkdir -p ../../equal_time \
        && cp -r ../../equal_queries/large_scale_ppo__preference__$SEED ../../equal_time)

python refl.py zoo \
    --num-iterations 45 --seed $SEED \
    --output-dir runs/benchmark-comparison/runs/refl__preference__$SEED \
    && mkdir -p runs/benchmark-comparison/equal_queries/refl__preference__$SEED \
    && (cd runs/benchmark-comparison/runs/refl__preference__$SEED \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors \
            ../../equal_queries/refl__preference__$SEED)
python refl.py \
    --num-iterations 54 \
    --resume runs/benchmark-comparison/runs/refl__preference__$SEED \
    && mkdir -p runs/benchmark-comparison/equal_time/refl__preference__$SEED \
    && (cd runs/benchmark-comparison/runs/refl__preference__$SEED \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors \
            ../../equal_time/refl__preference__$SEED)

python draft.py zoo \
    --num-iterations 15 --seed $SEED \
    --output-dir runs/benchmark-comparison/runs/draft__preference__$SEED \
    && mkdir -p runs/benchmark-comparison/equal_queries/draft__preference__$SEED \
    && (cd runs/benchmark-comparison/runs/draft__preference__$SEED \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors \
            ../../equal_queries/draft__preference__$SEED)
python draft.py \
    --num-iterations 40 \
    --resume runs/benchmark-comparison/runs/draft__preference__$SEED \
    && mkdir -p runs/benchmark-comparison/equal_time/draft__preference__$SEED \
    && (cd runs/benchmark-comparison/runs/draft__preference__$SEED \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors \
            ../../equal_time/draft__preference__$SEED)

python raft.py zoo \
    --num-iterations 15 --seed $SEED \
    --output-dir runs/benchmark-comparison/runs/raft__preference__$SEED \
    && mkdir -p runs/benchmark-comparison/equal_queries/raft__preference__$SEED \
    && (cd runs/benchmark-comparison/runs/raft__preference__$SEED \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors \
            ../../equal_queries/raft__preference__$SEED)
python raft.py \
    --num-iterations 22 \
    --resume runs/benchmark-comparison/runs/raft__preference__$SEED \
    && mkdir -p runs/benchmark-comparison/equal_time/raft__preference__$SEED \
    && (cd runs/benchmark-comparison/runs/raft__preference__$SEED \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors \
            ../../equal_time/raft__preference__$SEED)
python raft.py \
    --num-iterations 66 \
    --resume runs/benchmark-comparison/runs/raft__preference__$SEED \
    && mkdir -p runs/benchmark-comparison/longer/raft__preference__$SEED \
    && (cd runs/benchmark-comparison/runs/raft__preference__$SEED \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors \
            ../../longer/raft__preference__$SEED)

python reward_weighted.py zoo \
    --num-iterations 12 --seed $SEED \
    --output-dir runs/benchmark-comparison/runs/reward_weighted__preference__$SEED \
    && mkdir -p runs/benchmark-comparison/equal_time/reward_weighted__preference__$SEED \
    && (cd runs/benchmark-comparison/runs/reward_weighted__preference__$SEED \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors \
            ../../equal_time/reward_weighted__preference__$SEED)
python reward_weighted.py \
    --num-iterations 15 \
    --resume runs/benchmark-comparison/runs/reward_weighted__preference__$SEED \
    && mkdir -p runs/benchmark-comparison/equal_queries/reward_weighted__preference__$SEED \
    && (cd runs/benchmark-comparison/runs/reward_weighted__preference__$SEED \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors \
            ../../equal_queries/reward_weighted__preference__$SEED)
