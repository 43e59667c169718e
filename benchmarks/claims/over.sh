# Claim 11 of benchmarks/claims/README.md: DDPO for 5760 samples, on image reward and on
# incompressibility, and DPOK for 3840 with its KL and without. The weights on the way are kept.
#
# python -m benchmarks.run benchmarks/claims/over.sh --seeds 0 1 2 --jobs 2

python ddpo.py zoo --reward image_reward:zoo/image_reward \
    --rewarded-share 0.33 --num-iterations 45 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-over/ddpo-image-reward__$SEED \
    && (cd runs/claims-over/ddpo-image-reward__$SEED \
        && mkdir -p after_45 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_45)
python ddpo.py --num-iterations 90 --resume runs/claims-over/ddpo-image-reward__$SEED \
    && (cd runs/claims-over/ddpo-image-reward__$SEED \
        && mkdir -p after_90 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_90)
python ddpo.py --num-iterations 135 --resume runs/claims-over/ddpo-image-reward__$SEED \
    && (cd runs/claims-over/ddpo-image-reward__$SEED \
        && mkdir -p after_135 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_135)
python ddpo.py --num-iterations 180 --resume runs/claims-over/ddpo-image-reward__$SEED \
    && (cd runs/claims-over/ddpo-image-reward__$SEED \
        && mkdir -p after_180 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_180)

python ddpo.py zoo --reward jpeg_incompressibility --rewarded-share 0.5 --gradient-steps 4 \
    --learning-rate 1e-2 --num-iterations 45 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-over/ddpo-incompressibility__$SEED \
    && (cd runs/claims-over/ddpo-incompressibility__$SEED \
        && mkdir -p after_45 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_45)
python ddpo.py --num-iterations 90 --resume runs/claims-over/ddpo-incompressibility__$SEED \
    && (cd runs/claims-over/ddpo-incompressibility__$SEED \
        && mkdir -p after_90 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_90)
python ddpo.py --num-iterations 135 --resume runs/claims-over/ddpo-incompressibility__$SEED \
    && (cd runs/claims-over/ddpo-incompressibility__$SEED \
        && mkdir -p after_135 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_135)
python ddpo.py --num-iterations 180 --resume runs/claims-over/ddpo-incompressibility__$SEED \
    && (cd runs/claims-over/ddpo-incompressibility__$SEED \
        && mkdir -p after_180 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_180)

python dpok.py zoo --prompts-file prompts/zoo.txt --beta 0.1 \
    --cooldown-share 0 --num-iterations 40 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-over/dpok-with-kl__$SEED \
    && (cd runs/claims-over/dpok-with-kl__$SEED \
        && mkdir -p after_40 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_40)
python dpok.py --num-iterations 80 --resume runs/claims-over/dpok-with-kl__$SEED \
    && (cd runs/claims-over/dpok-with-kl__$SEED \
        && mkdir -p after_80 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_80)
python dpok.py --num-iterations 120 --resume runs/claims-over/dpok-with-kl__$SEED \
    && (cd runs/claims-over/dpok-with-kl__$SEED \
        && mkdir -p after_120 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_120)
python dpok.py --num-iterations 160 --resume runs/claims-over/dpok-with-kl__$SEED \
    && (cd runs/claims-over/dpok-with-kl__$SEED \
        && mkdir -p after_160 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_160)

python dpok.py zoo --prompts-file prompts/zoo.txt --beta 0 \
    --cooldown-share 0 --num-iterations 40 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-over/dpok-without-kl__$SEED \
    && (cd runs/claims-over/dpok-without-kl__$SEED \
        && mkdir -p after_40 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_40)
python dpok.py --num-iterations 80 --resume runs/claims-over/dpok-without-kl__$SEED \
    && (cd runs/claims-over/dpok-without-kl__$SEED \
        && mkdir -p after_80 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_80)
python dpok.py --num-iterations 120 --resume runs/claims-over/dpok-without-kl__$SEED \
    && (cd runs/claims-over/dpok-without-kl__$SEED \
        && mkdir -p after_120 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_120)
python dpok.py --num-iterations 160 --resume runs/claims-over/dpok-without-kl__$SEED \
    && (cd runs/claims-over/dpok-without-kl__$SEED \
        && mkdir -p after_160 \
        && cp args.json metrics.jsonl pytorch_lora_weights.safetensors after_160)
