# Claims 6, 7 and 8 of benchmarks/claims/README.md: DPOK with 1920 samples of the ten prompts of
# prompts/zoo.txt, with and without its value function.
#
# python -m benchmarks.run benchmarks/claims/many.sh --seeds 0 1 2 --jobs 2

python dpok.py zoo --prompts-file prompts/zoo.txt --num-iterations 80 --seed $SEED \
    --output-dir runs/claims-many/dpok__$SEED

python dpok.py zoo --prompts-file prompts/zoo.txt --num-iterations 80 --no-value-function \
    --seed $SEED \
    --output-dir runs/claims-many/dpok-without-value__$SEED
