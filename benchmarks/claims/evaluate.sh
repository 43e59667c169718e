# Judges the runs of this folder: of a prompt that a run has to itself 128 pictures, of one that is
# like it 64, of many prompts fewer of each. Of over.sh two seeds must be there: evaluate.py names the
# stops of one run alone after_45 and so on, and such names are not collected.
#
# python -m benchmarks.run benchmarks/claims/evaluate.sh --jobs 2

python evaluate.py zoo --prompt "A green colored rabbit" --images-per-prompt 128 \
    --lora runs/claims-single/*__a-green-colored-rabbit__* \
    --output-dir runs/claims-evaluations/single__a-green-colored-rabbit
python evaluate.py zoo --prompt "A green colored cat" --images-per-prompt 64 \
    --lora runs/claims-single/dpok__a-green-colored-rabbit__* \
    --output-dir runs/claims-evaluations/unseen__a-green-colored-rabbit

python evaluate.py zoo --prompt "A cat and a dog" --images-per-prompt 128 \
    --lora runs/claims-single/*__a-cat-and-a-dog__* \
    --output-dir runs/claims-evaluations/single__a-cat-and-a-dog
python evaluate.py zoo --prompt "A cat and a cup" --images-per-prompt 64 \
    --lora runs/claims-single/dpok__a-cat-and-a-dog__* \
    --output-dir runs/claims-evaluations/unseen__a-cat-and-a-dog

python evaluate.py zoo --prompt "Four wolves in the park" --images-per-prompt 128 \
    --lora runs/claims-single/*__four-wolves-in-the-park__* \
    --output-dir runs/claims-evaluations/single__four-wolves-in-the-park
python evaluate.py zoo --prompt "Four birds in the park" --images-per-prompt 64 \
    --lora runs/claims-single/dpok__four-wolves-in-the-park__* \
    --output-dir runs/claims-evaluations/unseen__four-wolves-in-the-park

python evaluate.py zoo --prompt "A dog on the moon" --images-per-prompt 128 \
    --lora runs/claims-single/*__a-dog-on-the-moon__* \
    --output-dir runs/claims-evaluations/single__a-dog-on-the-moon
python evaluate.py zoo --prompt "A lion on the moon" --images-per-prompt 64 \
    --lora runs/claims-single/dpok__a-dog-on-the-moon__* \
    --output-dir runs/claims-evaluations/unseen__a-dog-on-the-moon

python evaluate.py zoo --prompt "A green colored rabbit" --images-per-prompt 128 \
    --lora runs/claims-gamma/kl-* \
    --output-dir runs/claims-evaluations/gamma

python evaluate.py zoo --prompt "Four roses" --images-per-prompt 128 \
    --lora runs/claims-roses/dpok__* \
    --output-dir runs/claims-evaluations/roses

python evaluate.py zoo --prompts-file prompts/zoo.txt --images-per-prompt 32 \
    --lora runs/claims-many/dpok* \
    --output-dir runs/claims-evaluations/many

python evaluate.py zoo --prompts-file prompts/dpok_unseen.txt --images-per-prompt 64 \
    --lora runs/claims-many/dpok* \
    --output-dir runs/claims-evaluations/many_unseen

python evaluate.py zoo --prompts-file prompts/zoo.txt --images-per-prompt 16 \
    --rewards image_reward:zoo/image_reward jpeg_compressibility jpeg_incompressibility \
    --lora runs/claims-queries/* \
    --output-dir runs/claims-evaluations/queries

python evaluate.py zoo --prompts-file prompts/zoo.txt --images-per-prompt 16 \
    --lora runs/claims-over/ddpo-image-reward__*/after_* runs/claims-over/dpok-*/after_* \
    --output-dir runs/claims-evaluations/over

python evaluate.py zoo --prompts-file prompts/zoo.txt --images-per-prompt 16 \
    --rewards jpeg_incompressibility \
    --lora runs/claims-over/ddpo-incompressibility__*/after_* \
    --output-dir runs/claims-evaluations/over_incompressibility

python evaluate.py zoo --prompts-file prompts/zoo_preference_held_out.txt --images-per-prompt 32 \
    --lora runs/claims-joint/* \
    --output-dir runs/claims-evaluations/joint_preference

python evaluate.py zoo --prompts-file prompts/zoo_composition_held_out.txt --images-per-prompt 8 \
    --rewards object_detection:zoo/detector \
    --lora runs/claims-joint/* \
    --output-dir runs/claims-evaluations/joint_composition
python evaluate.py zoo --prompts-file prompts/zoo_composition.txt --images-per-prompt 8 \
    --rewards object_detection:zoo/detector \
    --lora runs/claims-joint/composition__* \
    --output-dir runs/claims-evaluations/trained_composition

python evaluate.py zoo --prompts-file prompts/zoo_portraits_held_out.txt --images-per-prompt 64 \
    --rewards statistical_parity:zoo/skin_tone \
    --lora runs/claims-joint/* \
    --output-dir runs/claims-evaluations/joint_portraits
python evaluate.py zoo --prompts-file prompts/zoo_portraits.txt --images-per-prompt 64 \
    --rewards statistical_parity:zoo/skin_tone \
    --lora runs/claims-joint/portraits__* \
    --output-dir runs/claims-evaluations/trained_portraits
