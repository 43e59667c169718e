# The tuning of benchmarks/claims/README.md for claim 9: three learning rates for each of four
# methods and three rewards, with seed 3, which counts nowhere.
#
# python -m benchmarks.run benchmarks/claims/tuning_queries.sh --seeds 3 --jobs 2

python ddpo.py zoo --estimator is --num-iterations 60 --reward jpeg_compressibility \
    --rewarded-share 0.5 --gradient-steps 4 --learning-rate 2.5e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-is-compressibility-2.5e-3__$SEED

python ddpo.py zoo --estimator is --num-iterations 60 --reward jpeg_compressibility \
    --rewarded-share 0.5 --gradient-steps 4 --learning-rate 5e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-is-compressibility-5e-3__$SEED

python ddpo.py zoo --estimator is --num-iterations 60 --reward jpeg_compressibility \
    --rewarded-share 0.5 --gradient-steps 4 --learning-rate 1e-2 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-is-compressibility-1e-2__$SEED

python ddpo.py zoo --estimator is --num-iterations 60 --reward jpeg_incompressibility \
    --rewarded-share 0.5 --gradient-steps 4 --learning-rate 2.5e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-is-incompressibility-2.5e-3__$SEED

python ddpo.py zoo --estimator is --num-iterations 60 --reward jpeg_incompressibility \
    --rewarded-share 0.5 --gradient-steps 4 --learning-rate 5e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-is-incompressibility-5e-3__$SEED

python ddpo.py zoo --estimator is --num-iterations 60 --reward jpeg_incompressibility \
    --rewarded-share 0.5 --gradient-steps 4 --learning-rate 1e-2 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-is-incompressibility-1e-2__$SEED

python ddpo.py zoo --estimator is --num-iterations 60 --reward image_reward:zoo/image_reward \
    --rewarded-share 0.33 --learning-rate 1e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-is-image-reward-1e-3__$SEED

python ddpo.py zoo --estimator is --num-iterations 60 --reward image_reward:zoo/image_reward \
    --rewarded-share 0.33 --learning-rate 2e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-is-image-reward-2e-3__$SEED

python ddpo.py zoo --estimator is --num-iterations 60 --reward image_reward:zoo/image_reward \
    --rewarded-share 0.33 --learning-rate 4e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-is-image-reward-4e-3__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward jpeg_compressibility \
    --rewarded-share 0.5 --learning-rate 4e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-sf-compressibility-4e-3__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward jpeg_compressibility \
    --rewarded-share 0.5 --learning-rate 8e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-sf-compressibility-8e-3__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward jpeg_compressibility \
    --rewarded-share 0.5 --learning-rate 1.6e-2 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-sf-compressibility-1.6e-2__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward jpeg_incompressibility \
    --rewarded-share 0.5 --learning-rate 4e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-sf-incompressibility-4e-3__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward jpeg_incompressibility \
    --rewarded-share 0.5 --learning-rate 8e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-sf-incompressibility-8e-3__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward jpeg_incompressibility \
    --rewarded-share 0.5 --learning-rate 1.6e-2 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-sf-incompressibility-1.6e-2__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward image_reward:zoo/image_reward \
    --rewarded-share 0.33 --learning-rate 2.5e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-sf-image-reward-2.5e-3__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward image_reward:zoo/image_reward \
    --rewarded-share 0.33 --learning-rate 5e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-sf-image-reward-5e-3__$SEED

python ddpo.py zoo --estimator sf --num-iterations 60 --reward image_reward:zoo/image_reward \
    --rewarded-share 0.33 --learning-rate 1e-2 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/ddpo-sf-image-reward-1e-2__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward jpeg_compressibility \
    --inverse-temperature 12 --learning-rate 1e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-compressibility-1e-3__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward jpeg_compressibility \
    --inverse-temperature 12 --learning-rate 2e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-compressibility-2e-3__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward jpeg_compressibility \
    --inverse-temperature 12 --learning-rate 4e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-compressibility-4e-3__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward jpeg_incompressibility \
    --inverse-temperature 30 --learning-rate 2.5e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-incompressibility-2.5e-3__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward jpeg_incompressibility \
    --inverse-temperature 30 --learning-rate 5e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-incompressibility-5e-3__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward jpeg_incompressibility \
    --inverse-temperature 30 --learning-rate 1e-2 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-incompressibility-1e-2__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward image_reward:zoo/image_reward \
    --learning-rate 1e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-image-reward-1e-3__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward image_reward:zoo/image_reward \
    --learning-rate 2e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-image-reward-2e-3__$SEED

python rwr.py zoo --weights softmax --num-iterations 10 --reward image_reward:zoo/image_reward \
    --learning-rate 4e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-image-reward-4e-3__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward jpeg_compressibility \
    --learning-rate 1e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-sparse-compressibility-1e-3__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward jpeg_compressibility \
    --learning-rate 2e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-sparse-compressibility-2e-3__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward jpeg_compressibility \
    --learning-rate 4e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-sparse-compressibility-4e-3__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward jpeg_incompressibility \
    --learning-rate 1e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-sparse-incompressibility-1e-3__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward jpeg_incompressibility \
    --learning-rate 2e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-sparse-incompressibility-2e-3__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward jpeg_incompressibility \
    --learning-rate 4e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-sparse-incompressibility-4e-3__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward image_reward:zoo/image_reward \
    --learning-rate 1e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-sparse-image-reward-1e-3__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward image_reward:zoo/image_reward \
    --learning-rate 2e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-sparse-image-reward-2e-3__$SEED

python rwr.py zoo --weights sparse --num-iterations 10 --reward image_reward:zoo/image_reward \
    --learning-rate 4e-3 \
    --seed $SEED --dtype fp32 --no-allow-tf32 \
    --output-dir runs/claims-tuning/rwr-sparse-image-reward-4e-3__$SEED
