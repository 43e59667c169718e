# Claims 13 and 14 of benchmarks/claims/README.md: large_scale_ppo.py on each of three tasks alone,
# and on all of them. The weights after half of the iterations are kept, for the docs of the script.
# Let it end before evaluate.sh is run: that would judge a run of one half as it is.
#
# python -m benchmarks.run benchmarks/claims/joint.sh --seeds 0 1 2 --jobs 2

python large_scale_ppo.py zoo --rewarded-share 0.4 --num-iterations 100 --seed $SEED \
    --dtype fp32 --no-allow-tf32 \
    --tasks "image_reward:zoo/image_reward prompts/zoo_preference.txt 12x3" \
        "object_detection:zoo/detector prompts/zoo_composition.txt 16x2" \
        "statistical_parity:zoo/skin_tone prompts/zoo_portraits.txt 24x2" \
    --output-dir runs/claims-joint/joint__$SEED \
    && (cd runs/claims-joint/joint__$SEED \
        && mkdir -p after_100 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_100)
python large_scale_ppo.py --num-iterations 200 --resume runs/claims-joint/joint__$SEED

python large_scale_ppo.py zoo --rewarded-share 0.4 --num-iterations 100 --seed $SEED \
    --dtype fp32 --no-allow-tf32 \
    --tasks "image_reward:zoo/image_reward prompts/zoo_preference.txt 12x3" \
    --output-dir runs/claims-joint/preference__$SEED \
    && (cd runs/claims-joint/preference__$SEED \
        && mkdir -p after_100 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_100)
python large_scale_ppo.py --num-iterations 200 --resume runs/claims-joint/preference__$SEED

python large_scale_ppo.py zoo --rewarded-share 0.4 --num-iterations 100 --seed $SEED \
    --dtype fp32 --no-allow-tf32 \
    --tasks "object_detection:zoo/detector prompts/zoo_composition.txt 16x2" \
    --output-dir runs/claims-joint/composition__$SEED \
    && (cd runs/claims-joint/composition__$SEED \
        && mkdir -p after_100 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_100)
python large_scale_ppo.py --num-iterations 200 --resume runs/claims-joint/composition__$SEED

python large_scale_ppo.py zoo --rewarded-share 0.4 --num-iterations 100 --seed $SEED \
    --dtype fp32 --no-allow-tf32 \
    --tasks "statistical_parity:zoo/skin_tone prompts/zoo_portraits.txt 24x2" \
    --output-dir runs/claims-joint/portraits__$SEED \
    && (cd runs/claims-joint/portraits__$SEED \
        && mkdir -p after_100 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_100)
python large_scale_ppo.py --num-iterations 200 --resume runs/claims-joint/portraits__$SEED
