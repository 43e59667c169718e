# The example of docs/evaluate.md: DPOK and SFT, each trained once on the paper's four prompts
# together, and asked for these and for four that they have not seen. Alone on the machine: the
# evaluations' seconds are published.
#
# python -m benchmarks.run benchmarks/commands/evaluate.sh
# python -m benchmarks.report evaluate        8 pictures a prompt: the seconds, and the picture
# python -m benchmarks.report evaluate_32     32 pictures a prompt: the tables
#
# The links give the models their names in the tables. What a stopped evaluation has drawn is
# removed, else it would not be timed.

python dpok.py zoo --prompts-file prompts/dpok.txt --num-iterations 120 --seed 0 \
    --output-dir runs/dpok_four
python sft_kl.py zoo --prompts-file prompts/dpok.txt --regularization kl-d --num-iterations 10 \
    --seed 0 --output-dir runs/sft_four_kl_d
rm -rf runs/benchmark-evaluate && mkdir -p runs/benchmark-evaluate \
    && ln -s ../dpok_four runs/benchmark-evaluate/DPOK \
    && ln -s ../sft_four_kl_d runs/benchmark-evaluate/SFT \
    && python evaluate.py zoo \
        --lora runs/benchmark-evaluate/DPOK runs/benchmark-evaluate/SFT \
        --rewards image_reward:zoo/image_reward jpeg_compressibility \
        --images-per-prompt 8 --output-dir runs/benchmark-evaluate/evaluation
rm -rf runs/benchmark-evaluate_32 && mkdir -p runs/benchmark-evaluate_32 \
    && ln -s ../dpok_four runs/benchmark-evaluate_32/DPOK \
    && ln -s ../sft_four_kl_d runs/benchmark-evaluate_32/SFT \
    && python evaluate.py zoo \
        --lora runs/benchmark-evaluate_32/DPOK runs/benchmark-evaluate_32/SFT \
        --rewards image_reward:zoo/image_reward jpeg_compressibility \
        --images-per-prompt 32 --output-dir runs/benchmark-evaluate_32/evaluation
