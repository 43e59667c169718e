# Claim 4 of benchmarks/claims/README.md: KL-O and KL-D over four gammas, from the same samples of
# the rabbit.
#
# python -m benchmarks.run benchmarks/claims/gamma.sh --seeds 0 1 2 --jobs 2

python sft_kl.py zoo --regularization kl-o --gamma 0.1 --prompt "A green colored rabbit" \
    --seed $SEED --dataset runs/claims-gamma/data__$SEED \
    --output-dir runs/claims-gamma/kl-o-0.1__$SEED
python sft_kl.py zoo --regularization kl-d --gamma 0.1 --prompt "A green colored rabbit" \
    --seed $SEED --dataset runs/claims-gamma/data__$SEED \
    --output-dir runs/claims-gamma/kl-d-0.1__$SEED
python sft_kl.py zoo --regularization kl-o --gamma 1 --prompt "A green colored rabbit" \
    --seed $SEED --dataset runs/claims-gamma/data__$SEED \
    --output-dir runs/claims-gamma/kl-o-1__$SEED
python sft_kl.py zoo --regularization kl-d --gamma 1 --prompt "A green colored rabbit" \
    --seed $SEED --dataset runs/claims-gamma/data__$SEED \
    --output-dir runs/claims-gamma/kl-d-1__$SEED
python sft_kl.py zoo --regularization kl-o --gamma 2 --prompt "A green colored rabbit" \
    --seed $SEED --dataset runs/claims-gamma/data__$SEED \
    --output-dir runs/claims-gamma/kl-o-2__$SEED
python sft_kl.py zoo --regularization kl-d --gamma 2 --prompt "A green colored rabbit" \
    --seed $SEED --dataset runs/claims-gamma/data__$SEED \
    --output-dir runs/claims-gamma/kl-d-2__$SEED
python sft_kl.py zoo --regularization kl-o --gamma 5 --prompt "A green colored rabbit" \
    --seed $SEED --dataset runs/claims-gamma/data__$SEED \
    --output-dir runs/claims-gamma/kl-o-5__$SEED
python sft_kl.py zoo --regularization kl-d --gamma 5 --prompt "A green colored rabbit" \
    --seed $SEED --dataset runs/claims-gamma/data__$SEED \
    --output-dir runs/claims-gamma/kl-d-5__$SEED
