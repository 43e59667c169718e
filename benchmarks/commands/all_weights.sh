# The table of docs/runs.md: every script on the zoo with --lora-rank 0, one run each.
#
# python -m benchmarks.run benchmarks/commands/all_weights.sh --jobs 2
# python -m benchmarks.report all_weights

python dpok.py zoo --prompt "A green colored rabbit" --lora-rank 0 --learning-rate 1e-4 \
    --num-iterations 40 --output-dir runs/benchmark-all-weights/dpok

python ddpo.py zoo --lora-rank 0 --learning-rate 1e-4 --num-iterations 30 --rewarded-share 0.5 \
    --output-dir runs/benchmark-all-weights/ddpo

python rwr.py zoo --lora-rank 0 --learning-rate 1e-4 --num-iterations 4 \
    --output-dir runs/benchmark-all-weights/rwr

python sft_kl.py zoo --prompt "A green colored rabbit" --lora-rank 0 --learning-rate 1e-4 \
    --output-dir runs/benchmark-all-weights/sft_kl

python large_scale_ppo.py zoo --tasks "image_reward:zoo/image_reward prompts/zoo_preference.txt 12x3" \
    --lora-rank 0 --learning-rate 3e-5 --num-iterations 40 \
    --output-dir runs/benchmark-all-weights/large_scale_ppo
