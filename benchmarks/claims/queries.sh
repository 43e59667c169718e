# Claim 9 of benchmarks/claims/README.md: DDPO with both estimators and RWR with both weights, 1920
# samples of three rewards each, at the rates of docs/claims.md.
#
# python -m benchmarks.run benchmarks/claims/queries.sh --seeds 0 1 2 --jobs 2

python ddpo.py zoo --estimator is --num-iterations 60 --reward jpeg_compressibility \
    --rewarded-share 0.5 --gradient-steps 4 --learning-rate 2.5e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/ddpo-is__compressibility__$SEED

python ddpo.py zoo --estimator is --num-iterations 60 --reward jpeg_incompressibility \
    --rewarded-share 0.5 --gradient-steps 4 --learning-rate 1e-2 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/ddpo-is__incompressibility__$SEED

python ddpo.py zoo --estimator is --num-iterations 60 --reward image_reward:zoo/image_reward \
    --rewarded-share 0.33 --learning-rate 2e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/ddpo-is__image-reward__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward jpeg_compressibility \
    --rewarded-share 0.5 --learning-rate 8e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/ddpo-sf__compressibility__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward jpeg_incompressibility \
    --rewarded-share 0.5 --learning-rate 8e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/ddpo-sf__incompressibility__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward image_reward:zoo/image_reward \
    --rewarded-share 0.33 --learning-rate 2.5e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/ddpo-sf__image-reward__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward jpeg_compressibility \
    --inverse-temperature 12 --learning-rate 4e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/rwr__compressibility__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward jpeg_incompressibility \
    --inverse-temperature 30 --learning-rate 2.5e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/rwr__incompressibility__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward image_reward:zoo/image_reward \
    --learning-rate 4e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/rwr__image-reward__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward jpeg_compressibility \
    --learning-rate 1e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/rwr-sparse__compressibility__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward jpeg_incompressibility \
    --learning-rate 2e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/rwr-sparse__incompressibility__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward image_reward:zoo/image_reward \
    --learning-rate 4e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-queries/rwr-sparse__image-reward__$SEED
