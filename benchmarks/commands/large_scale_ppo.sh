# The tables and the curves of docs/large_scale_ppo.md and its notes.
#
# python -m benchmarks.run benchmarks/commands/large_scale_ppo.sh --seeds 0 1 2 --jobs 2
# python -m benchmarks.report large_scale_ppo

# Table 5: each task alone, for 100 iterations of the preset. Of the first the weights are kept on
# the way, for the comparison at equal reward.

python large_scale_ppo.py zoo --num-iterations 20 --seed $SEED \
    --tasks "image_reward:zoo/image_reward prompts/zoo_preference.txt 12x3" \
    --output-dir runs/benchmark-large-scale-ppo/preference__$SEED \
    && (cd runs/benchmark-large-scale-ppo/preference__$SEED \
        && mkdir -p after_20 && cp pytorch_lora_weights.safetensors after_20)
python large_scale_ppo.py --num-iterations 40 \
    --resume runs/benchmark-large-scale-ppo/preference__$SEED \
    && (cd runs/benchmark-large-scale-ppo/preference__$SEED \
        && mkdir -p after_40 && cp pytorch_lora_weights.safetensors after_40)
python large_scale_ppo.py --num-iterations 60 \
    --resume runs/benchmark-large-scale-ppo/preference__$SEED \
    && (cd runs/benchmark-large-scale-ppo/preference__$SEED \
        && mkdir -p after_60 && cp pytorch_lora_weights.safetensors after_60)
python large_scale_ppo.py --num-iterations 80 \
    --resume runs/benchmark-large-scale-ppo/preference__$SEED \
    && (cd runs/benchmark-large-scale-ppo/preference__$SEED \
        && mkdir -p after_80 && cp pytorch_lora_weights.safetensors after_80)
python large_scale_ppo.py --num-iterations 100 \
    --resume runs/benchmark-large-scale-ppo/preference__$SEED \
    && (cd runs/benchmark-large-scale-ppo/preference__$SEED \
        && mkdir -p after_100 && cp pytorch_lora_weights.safetensors after_100)

python large_scale_ppo.py zoo --seed $SEED \
    --tasks "object_detection:zoo/detector prompts/zoo_composition.txt 16x2" \
    --output-dir runs/benchmark-large-scale-ppo/composition__$SEED

python large_scale_ppo.py zoo --seed $SEED \
    --tasks "statistical_parity:zoo/skin_tone prompts/zoo_portraits.txt 24x2" \
    --output-dir runs/benchmark-large-scale-ppo/portraits__$SEED

# All three tasks: as many samples of each as that task's own run has.

python large_scale_ppo.py zoo --seed $SEED \
    --tasks "image_reward:zoo/image_reward prompts/zoo_preference.txt 12x3" \
        "object_detection:zoo/detector prompts/zoo_composition.txt 16x2" \
        "statistical_parity:zoo/skin_tone prompts/zoo_portraits.txt 24x2" \
    --output-dir runs/benchmark-large-scale-ppo/joint__$SEED

# Appendix G: without the pre-training loss. It is compared at a reward that both runs reach, and
# ends after three fifths of the iterations.

python large_scale_ppo.py zoo --pretrain-beta 0 --num-iterations 20 --seed $SEED \
    --tasks "image_reward:zoo/image_reward prompts/zoo_preference.txt 12x3" \
    --output-dir runs/benchmark-large-scale-ppo/preference-without-the-pre-training-loss__$SEED \
    && (cd runs/benchmark-large-scale-ppo/preference-without-the-pre-training-loss__$SEED \
        && mkdir -p after_20 && cp pytorch_lora_weights.safetensors after_20)
python large_scale_ppo.py --num-iterations 40 \
    --resume runs/benchmark-large-scale-ppo/preference-without-the-pre-training-loss__$SEED \
    && (cd runs/benchmark-large-scale-ppo/preference-without-the-pre-training-loss__$SEED \
        && mkdir -p after_40 && cp pytorch_lora_weights.safetensors after_40)
python large_scale_ppo.py --num-iterations 60 \
    --resume runs/benchmark-large-scale-ppo/preference-without-the-pre-training-loss__$SEED \
    && (cd runs/benchmark-large-scale-ppo/preference-without-the-pre-training-loss__$SEED \
        && mkdir -p after_60 && cp pytorch_lora_weights.safetensors after_60)
