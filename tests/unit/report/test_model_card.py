"""The model card says what it was told, in YAML and Markdown that hold together, and nothing else."""

import json

from earthshine.report.model_card import model_card

INFO = {
    "name": "smollm2-e8t2",
    "license": "apache-2.0",
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "tags": ["code", 'quo"ted: [tag]'],
    "architecture": "Qwen2MoeForCausalLM",
    "model": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "vocab_size": 49152,
        "moe": {"num_experts": 8, "top_k": 2, "layers": [1, 2]},
    },
    "parameters": {"total": 283185216, "active": 155778624},
    "lineage": ["SmolLM2-135M-Instruct (GGUF, Q4_1)", "upcycled to 8 experts", "trained for 4 steps"],
    "upcycling": {"options": {"experts": 8, "top_k": 2, "layers": [1, 2], "router_std": 0.02, "seed": 0}},
    "training": {
        "job": {"optimizer": {"algorithm": "muon", "lr": 3e-4}, "seq_len": 512, "sequences_per_step": 16},
        "steps": 4,
        "tokens": 32760,
    },
    "data": [{"path": "stdlib", "weight": 1.0, "tokens": 5_000_000}],
    "evaluation": [{"name": "held-out stdlib", "loss": 2.3783, "stderr": 0.0629, "bits_per_byte": 0.99}],
    "verification": [
        {"check": "upcycle", "rows": [{"name": "logits", "measured": 1.9e-6, "tolerance": 1e-5, "ok": True}]},
    ],
    "limitations": ["A demonstration."],
    "sha256": "abc|<b>",
}


def front_matter(card: str) -> list[str]:
    _, head, _ = card.split("---\n", 2)
    return head.splitlines()


def test_a_full_card():
    card = model_card(INFO)
    head = front_matter(card)
    assert 'license: "apache-2.0"' in head
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"' in head
    tags = [json.loads(line[2:]) for line in head if line.startswith("- ")]
    assert tags == ["earthshine", "mixture-of-experts", "upcycled", "muon", "code", 'quo"ted: [tag]']
    titles = [line[3:] for line in card.splitlines() if line.startswith("## ")]
    assert titles == ["Model", "Lineage", "Upcycling recipe", "Training", "Data", "Evaluation", "Verification", "Use",
                      "Limitations", "Further facts"]  # fmt: skip
    for words in (
        "155,778,624 of them active per token, upcycled from a dense model; continued from",
        "8, top-2, in 2 of 30 layers",
        "2. upcycled to 8 experts",
        "| Layers converted | 1, 2 |",
        "| Tokens | 32,760 |",
        "| stdlib | 1 | 5,000,000 |",
        "2.3783 ± 0.0629",
        "| upcycle: logits | 1.9×10⁻⁶ | 10⁻⁵ | pass |",
        "- A demonstration.",
        "| sha256 | abc\\|&lt;b&gt; |",
    ):
        assert words in card


def test_qk_clip_is_named_where_it_was_on():
    job = INFO["training"]["job"]
    assert "QK-Clip" not in model_card(INFO)
    clipped = job | {"optimizer": job["optimizer"] | {"qk_clip_threshold": 100.0}}
    assert "| QK-Clip threshold | 100.0 |" in model_card(INFO | {"training": {"job": clipped}})


def test_bits_per_byte_of_a_text_that_cannot_be_spelled_are_marked():
    (result,) = INFO["evaluation"]
    assert "(lossy" not in model_card(INFO)
    assert "0.9900 (lossy: unknown tokens)" in model_card(INFO | {"evaluation": [result | {"lost": "some"}]})


def test_what_is_unknown_is_left_out():
    card = model_card({})
    assert card == (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- \"earthshine\"\n---\n\n"
        "# Model\n\nA language model. Made with Earthshine.\n"
    )  # fmt: skip
    for key in INFO:
        smaller = model_card({k: v for k, v in INFO.items() if k != key})
        assert "None" not in smaller and "nan" not in smaller


def test_a_folder_is_not_a_hub_id():
    for path in ("/home/me/models/dense", "../dense", "models/smollm2/dense", "dense", "a b"):
        card = model_card({"base_model": path})
        assert "base_model" not in "".join(front_matter(card))
        assert f"its weights come from `{path}`" in card


def test_yaml_cannot_be_broken_out_of():
    card = model_card({"license": "mit\n---\nevil: true", "name": "x\n---\ny"})
    assert front_matter(card)[0] == 'license: "mit\\n---\\nevil: true"'
    assert "# x --- y" in card.splitlines()
