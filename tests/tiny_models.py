"""Tiny models of the real architectures with random weights, for tests and benchmarks.

Each is saved as a user's folder.
"""

from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
WORDS = "a an the cat dog cup bottle red green on in park moon and next to near of side beside "
WORDS += "is what happening this image two photo user assistant : ? . <image>"
WORDS = WORDS.split()
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def pictures(count: int, height: int = 40, width: int = 40, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures, so that resizing does not average everything away."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    coarse = coarse * torch.rand(count, 3, 1, 1, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width))


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that outputs differ from picture to picture."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data.copy_(noise * parameter[0].numel() ** -0.5 * 1.5)
        else:
            parameter.data.add_(noise * 0.2)
    return model.eval()


def word_tokenizer(special: dict[str, str], **settings):
    """A tokenizer of whole words with a beginning and an end token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = list(special.values())
    vocabulary = {word: i for i, word in enumerate([*names, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    split = [pre_tokenizers.WhitespaceSplit()]
    if "<image>" not in settings.get("extra_special_tokens", {}).values():
        split.append(pre_tokenizers.Punctuation())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    first = special.get("cls_token", special.get("bos_token"))
    last = special.get("sep_token", special.get("eos_token"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=24, **special, **settings
    )


CLIP_SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BERT_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def make_clip(folder: Path) -> Path:
    """A CLIP model, with LAION's predictor beside it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(2)  # pictures of all classes when it is asked for three
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "zoo/sd/tokenizer")
    text = TINY | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    text |= {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "projection_dim": 12,
    }
    vision = TINY | {"image_size": 32, "patch_size": 8, "projection_dim": 12}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    randomise(CLIPModel(config)).save_pretrained(folder)
    CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
    ).save_pretrained(folder)
    generator, state = torch.Generator().manual_seed(5), {}
    shapes = {0: (8, 12), 2: (6, 8), 4: (5, 6), 6: (4, 5), 7: (1, 4)}
    for i, shape in shapes.items():
        state[f"layers.{i}.weight"] = torch.randn(shape, generator=generator)
    for i, shape in shapes.items():
        state[f"layers.{i}.bias"] = torch.randn(shape[0], generator=generator)
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


def open_clip_shapes(
    vocabulary: int, length: int, text: tuple, vision: tuple, patches: int, patch: int, dim: int
) -> dict[str, tuple[int, ...]]:
    """The weights of a CLIP of open_clip by name; `text` and `vision` are widths and layers."""
    shapes = {
        "token_embedding.weight": (vocabulary, text[0]),
        "positional_embedding": (length, text[0]),
        "text_projection": (text[0], dim),
        "logit_scale": (),
        "visual.conv1.weight": (vision[0], 3, patch, patch),
        "visual.class_embedding": (vision[0],),
        "visual.positional_embedding": (patches + 1, vision[0]),
        "visual.proj": (vision[0], dim),
    }
    norms = {"ln_final": text[0], "visual.ln_pre": vision[0], "visual.ln_post": vision[0]}
    for begin, (width, layers) in (("", text), ("visual.", vision)):
        for layer in range(layers):
            block = f"{begin}transformer.resblocks.{layer}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            linear = {
                "attn.in_proj_": (3 * width, width),
                "attn.out_proj.": (width, width),
                "mlp.c_fc.": (4 * width, width),
                "mlp.c_proj.": (width, 4 * width),
            }
            for name, shape in linear.items():
                shapes |= {f"{block}.{name}weight": shape, f"{block}.{name}bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def make_hps(folder: Path, file: str = "HPS_v2_compressed.pt", seed: int = 6) -> Path:
    """A CLIP of open_clip as HPS v2 is published: 16 heads, its weights under "state_dict"."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "zoo/sd/tokenizer")
    tokenizer.save_pretrained(folder)
    generator, state = torch.Generator().manual_seed(seed), {}
    shapes = open_clip_shapes(len(tokenizer), 24, (32, 2), (48, 2), patches=16, patch=8, dim=12)
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[name] = noise * 1.5 * noise[0].numel() ** -0.5
        else:
            state[name] = noise * 0.2 + name.endswith("weight")
    torch.save({"epoch": 1, "state_dict": state}, folder / file)
    return folder


def make_blip(folder: Path) -> Path:
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForImageTextRetrieval,
        BlipImageProcessor,
        BlipProcessor,
    )

    torch.manual_seed(0)
    (folder / "vocab.txt").write_text("\n".join([*BERT_SPECIAL.values(), *WORDS]) + "\n")
    tokenizer = BertTokenizer.from_pretrained(folder, model_max_length=24)
    text = TINY | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    text |= {"encoder_hidden_size": 16, "bos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config=text,
        vision_config=TINY | {"image_size": 32, "patch_size": 8},
        image_text_hidden_size=12,
    )
    randomise(BlipForImageTextRetrieval(config)).save_pretrained(folder)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    processor.save_pretrained(folder)
    return folder


def make_bert(folder: Path) -> Path:
    """A text model for BERTScore."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = word_tokenizer(BERT_SPECIAL)
    tokenizer.save_pretrained(folder)
    config = BertConfig(**TINY, vocab_size=len(tokenizer), max_position_embeddings=32)
    randomise(BertModel(config)).save_pretrained(folder)
    return folder


def make_deberta(folder: Path) -> Path:
    """A text model for BERTScore whose positions are relative, as those of the default are."""
    from transformers import DebertaConfig, DebertaModel

    torch.manual_seed(0)
    tokenizer = word_tokenizer(BERT_SPECIAL)
    tokenizer.save_pretrained(folder)
    config = DebertaConfig(
        **TINY,
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        type_vocab_size=0,
    )
    randomise(DebertaModel(config)).save_pretrained(folder)
    return folder


def make_llava(folder: Path) -> Path:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    tokenizer = word_tokenizer(CLIP_SPECIAL, extra_special_tokens={"image_token": "<image>"})
    tokenizer.model_max_length = 128
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TINY, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **TINY,
            vocab_size=len(tokenizer),
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    randomise(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    template = "{% for m in messages %}user : {% for c in m['content'] %}"
    template += "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
    template += "{% endfor %}{% endfor %}assistant :"
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def make_detectors(parent: Path) -> dict[str, Path]:
    """A detector of each family, in folders of `parent`.

    Any words, or the fixed classes cat, dog, cup.
    """
    from transformers import (
        BertTokenizer,
        CLIPTokenizer,
        DetrConfig,
        DetrForObjectDetection,
        DetrImageProcessor,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
        ResNetConfig,
        ResNetForImageClassification,
        RTDetrConfig,
        RTDetrForObjectDetection,
        RTDetrImageProcessor,
        ViTImageProcessor,
    )

    torch.manual_seed(0)
    folders = {}

    def folder(name):
        folders[name] = parent / name
        folders[name].mkdir()
        return folders[name]

    labels = {
        "id2label": {0: "cat", 1: "dog", 2: "cup"},
        "label2id": {"cat": 0, "dog": 1, "cup": 2},
    }
    size = {"height": 32, "width": 32}

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "zoo/sd/tokenizer", model_max_length=16)
    text = TINY | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Owlv2Config(
        text_config=text,
        vision_config=TINY | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    randomise(Owlv2ForObjectDetection(config)).save_pretrained(folder("owlv2"))
    Owlv2Processor(Owlv2ImageProcessor(size=size), tokenizer).save_pretrained(folders["owlv2"])

    backbone = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
    }
    backbone |= {"layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}
    sizes = {
        "d_model": 32,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_layers": 1,
    }
    sizes |= {"decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 9}
    words = "\n".join([*BERT_SPECIAL.values(), *WORDS])
    (folder("grounding-dino") / "vocab.txt").write_text(words + "\n")
    bert = BertTokenizer.from_pretrained(folders["grounding-dino"], model_max_length=16)
    text = TINY | {"vocab_size": len(bert), "max_position_embeddings": 32}
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text | {"model_type": "bert"},
        **sizes,
        num_feature_levels=3,
        max_text_len=16,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        disable_custom_kernels=True,
    )
    model = randomise(GroundingDinoForObjectDetection(config))
    for parameter in model.model.decoder.layer_norm.parameters():
        parameter.data *= 0.2  # confidences that differ: those of large logits are all 1
    model.save_pretrained(folders["grounding-dino"])
    processor = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    GroundingDinoProcessor(processor, bert).save_pretrained(folders["grounding-dino"])

    config = DetrConfig(
        backbone_config=backbone | {"out_features": ["stage4"]},
        use_timm_backbone=False,
        backbone=None,
        **sizes,
        **labels,
    )
    randomise(DetrForObjectDetection(config)).save_pretrained(folder("detr"))
    processor = DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    processor.save_pretrained(folders["detr"])

    config = RTDetrConfig(
        backbone_config=backbone | {"model_type": "rt_detr_resnet"},
        encoder_hidden_dim=16,
        encoder_in_channels=[16, 24, 32],
        feat_strides=[8, 16, 32],
        decoder_in_channels=[16, 16, 16],
        **sizes,
        num_feature_levels=3,
        num_denoising=0,
        eval_size=None,
        **labels,
    )
    randomise(RTDetrForObjectDetection(config)).save_pretrained(folder("rt-detr"))
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folders["rt-detr"])

    backbone.pop("out_features")
    backbone.pop("model_type")
    config = ResNetConfig(**backbone, **labels, problem_type="multi_label_classification")
    randomise(ResNetForImageClassification(config)).save_pretrained(folder("multi-label"))
    ViTImageProcessor(size=size).save_pretrained(folders["multi-label"])
    return folders
