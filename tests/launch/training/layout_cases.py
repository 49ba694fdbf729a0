"""The layouts that are tested: number of ranks, JSON and sizes. The README's table of what can be combined follows this list."""

LLAMA = {"tie_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 2, "qk_norm": True, "document_mask": True}
GPT2 = {
    "tie_embeddings": False,
    "num_attention_heads": 4,
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu_tanh",
    "biases": True,
}
BERT = GPT2 | {
    "architecture": "encoder",
    "tie_embeddings": True,
    "norm_position": "post",
    "activation": "gelu",
    "token_types": 2,
    "num_classes": 2,
}
MODERN_BERT = {
    "architecture": "encoder",
    "tie_embeddings": True,
    "num_attention_heads": 4,
    "norm": "layernorm",
    "activation": "geglu",
    "sliding_window": 9,
}
TRANSFORMER = {
    "architecture": "encoder_decoder",
    "tie_embeddings": True,
    "num_attention_heads": 4,
    "norm": "layernorm",
    "norm_position": "post",
    "positions": "sinusoidal",
    "activation": "relu",
    "biases": True,
}
T5 = {
    "architecture": "encoder_decoder",
    "tie_embeddings": False,
    "num_attention_heads": 4,
    "num_decoder_layers": 3,
    "positions": "relative",
    "activation": "geglu",
}
FAMILIES = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT, "modern_bert": MODERN_BERT, "transformer": TRANSFORMER, "t5": T5}
DECODERS = ("llama", "gpt2")
LOSSES = {"transformer": {"label_smoothing": 0.1}, "t5": {"z_loss": 0.01}}
"""Loss settings of the families that do not use the defaults."""

TENSOR, SEQUENCE, STAGES = {"tensor_parallel_size": 2}, {"sequence_parallel_size": 2}, {"pipeline_stages": 2}

# (ranks, JSON, sizes of the layout). Each is trained, saved, and resumes from the checkpoint of another.
LAYOUTS = [
    *((1, json, {}) for json in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")),
    *((2, json, {}) for json in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")),
    *((2, json, STAGES) for json in ("pipeline_zero1", "pipeline_dualpipev")),
    *((2, json, sizes) for sizes in (TENSOR, SEQUENCE) for json in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")),
    *((4, json, {}) for json in ("zero1", "zero2", "zero3", "zero3_hierarchical")),
    *((4, json, TENSOR) for json in ("zero1", "zero3")),
    *((4, json, SEQUENCE) for json in ("zero1", "zero3", "zero3_hierarchical")),
    *((4, json, TENSOR | SEQUENCE) for json in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")),
    (4, "zero1", {"sequence_parallel_size": 4}),
    *((4, json, STAGES) for json in ("pipeline_zero1", "pipeline_dualpipev")),
    (4, "pipeline_zero1", {"pipeline_stages": 4}),
    *((4, json, STAGES | TENSOR) for json in ("pipeline_zero1", "pipeline_dualpipev")),
    *((4, json, STAGES | SEQUENCE) for json in ("pipeline_zero1", "pipeline_dualpipev")),
]
OTHER_OPTIMIZERS = ("lamb", "muon")
"""Optimizers that are compared next to AdamW, each in its share of the layouts."""
_WITHOUT_GROUPS = [
    *((2, json, {}) for json in ("zero1", "zero2", "zero3")),
    *((2, json, STAGES) for json in ("pipeline_zero1", "pipeline_dualpipev")),
]
FAMILY_LAYOUTS = {
    "bert": [*_WITHOUT_GROUPS, (2, "zero1", TENSOR)],
    "modern_bert": [(2, "zero1", TENSOR), (2, "zero1", SEQUENCE), (2, "zero3", SEQUENCE)],
    "transformer": _WITHOUT_GROUPS,
    "t5": _WITHOUT_GROUPS,
}
"""Layouts of the families that are not decoders."""


# Training after compression. {models} is the folder of a model with half of its linear weights 0, and of its teacher.
HALF_ZERO = ["--init={models}/pruned", "--hold_zeros=true", "--train_steps=200"]
TAUGHT = [
    *HALF_ZERO,
    "--distillation.teacher={models}/dense",
    "--distillation.kl_weight=0.7",
    "--distillation.cross_entropy_weight=0.5",
    "--distillation.temperature=2",
]
# With a zero point: symmetric integers put the largest value of each group halfway between two of them, so that the last bit of
# float32 would decide.
ROUNDED = [*HALF_ZERO, "--quantization.bits=4", "--quantization.group_size=16", "--quantization.symmetric=false"]
GATHERED = {"zero": {"stage3_param_persistence_threshold": 0}}
"""With this option no weight stays whole under ZeRO-3."""
AFTER_COMPRESSION = {
    f"{name} {json}": (json, sizes, words, more)
    for name, words, layouts in (
        (
            "taught",
            TAUGHT,
            (("zero3", {}, GATHERED), ("pipeline_zero1", STAGES, {}), ("zero1", TENSOR, {}), ("pipeline_dualpipev", STAGES, {})),
        ),
        ("rounded", ROUNDED, (("zero2", {}, {}), ("zero3", {}, GATHERED), ("pipeline_zero1", STAGES, {}))),
        ("taught by muon", TAUGHT, (("zero3", {}, GATHERED | {"optimizer": "muon"}), ("zero1", TENSOR, {"optimizer": "muon"}))),
        *(
            (f"rounded by {name}", ROUNDED, (("zero2_offload", {}, {"optimizer": name}),))
            for name in ("muon", "lamb", "lars", "lion", "sgd")
        ),
        ("taught in bf16", TAUGHT, (("zero1", {}, {"precision": "bf16"}),)),
    )
    for json, sizes, more in layouts
}


def case_of(json: str, sizes: dict, family: str, **more) -> dict:
    case = {"json": json, "layout": sizes, "model": FAMILIES[family], "loss": LOSSES.get(family, {})} | more
    if json == "pipeline_dualpipev":  # needs many micro-batches
        case |= {"micro_batch": 1}
    if json == "zero3_hierarchical":  # the part of ZeRO++ that works without a GPU
        case |= {"json": "zero3", "zero": {"zero_hpz_partition_size": 2}}
    return case


def name_of(ranks: int, json: str, sizes: dict, *more: str) -> str:
    return "-".join([f"{ranks}", json, *(f"{name.split('_')[0]}{size}" for name, size in sizes.items()), *more])
