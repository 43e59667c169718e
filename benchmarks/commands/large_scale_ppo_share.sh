# What docs/notes/large_scale_ppo.md says of --rewarded-share: preference alone, as in
# large_scale_ppo.sh, with timesteps of the first five steps.
#
# python -m benchmarks.run benchmarks/commands/large_scale_ppo_share.sh --seeds 0 1 2 --jobs 2
# python -m benchmarks.report large_scale_ppo_share

python large_scale_ppo.py zoo --rewarded-share 0.4 --num-iterations 20 --seed $SEED \
    --tasks "image_reward:zoo/image_reward prompts/zoo_preference.txt 12x3" \
    --output-dir runs/benchmark-large-scale-ppo-share/preference__$SEED \
    && (cd runs/benchmark-large-scale-ppo-share/preference__$SEED \
        && mkdir -p after_20 && cp pytorch_lora_weights.safetensors after_20)
python large_scale_ppo.py --num-iterations 40 \
    --resume runs/benchmark-large-scale-ppo-share/preference__$SEED \
    && (cd runs/benchmark-large-scale-ppo-share/preference__$SEED \
        && mkdir -p after_40 && cp pytorch_lora_weights.safetensors after_40)
