"""Every way to get one setting wrong is told with its path, its rule and its value."""

import re
import time
from collections.abc import Callable

import pytest

from megatron_bert_tp.config.kinds import is_optional, name_of
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.settings import all_settings
from tests.config.bad_optimizer_settings import BAD_OPTIMIZER, INTEGER, NUMBER
from tests.config.bad_run_settings import BAD_RUN, TEXT, TRUTH

Complaint = Callable[..., str]


# Path, YAML text, part of the rule.
BAD = [
    ("model.vocab_size", "0", "must be at least 1"),
    ("model.vocab_size", "-4096", "must be at least 1"),
    ("model.vocab_size", "4096.0", INTEGER),
    ("model.vocab_size", "4_096", INTEGER),
    ("model.vocab_size", "'4096'", INTEGER),
    ("model.vocab_size", "true", INTEGER),
    ("model.vocab_size", "null", INTEGER),
    ("model.vocab_size", "", INTEGER),
    ("model.vocab_size", "[4096]", INTEGER),
    ("model.vocab_size", "{size: 4096}", INTEGER),
    ("model.vocab_size", "1e30", INTEGER),
    ("model.vocab_size", "100000000000000000000", "63 bits"),
    ("model.vocab_size", "9" * 5000, INTEGER),
    ("model.vocab_size", ".inf", INTEGER),
    ("model.hidden_size", "0", "must be at least 1"),
    ("model.hidden_size", "large", INTEGER),
    ("model.hidden_size", "0x30", INTEGER),
    ("model.hidden_size", "048", INTEGER),
    ("model.hidden_size", "1:30", INTEGER),
    ("model.hidden_size", "50", "multiple of model.num_attention_heads (4)"),
    ("model.num_hidden_layers", "0", "must be at least 1"),
    ("model.num_hidden_layers", "2.5", INTEGER),
    ("model.num_attention_heads", "0", "must be at least 1"),
    ("model.num_attention_heads", "no", INTEGER),
    ("model.intermediate_size", "0", "must be at least 1"),
    ("model.intermediate_size", "96 ranks", INTEGER),
    ("model.hidden_act", "tanh", "must be gelu, gelu_new, relu or silu"),
    ("model.hidden_act", "null", "must be gelu, gelu_new, relu or silu"),
    ("model.position_embedding_type", "rotary", "must be absolute, relative_key or relative_key_query"),
    ("model.hidden_dropout_prob", "1", "at most 0.99"),
    ("model.hidden_dropout_prob", "-0.1", "must be at least 0"),
    ("model.hidden_dropout_prob", "7e-6", "must be 0 or at least 1e-05"),
    ("model.hidden_dropout_prob", "ten percent", NUMBER),
    ("model.hidden_dropout_prob", "10%", NUMBER),
    ("model.hidden_dropout_prob", "false", NUMBER),
    ("model.hidden_dropout_prob", ".nan", "finite"),
    ("model.attention_probs_dropout_prob", "0.999999", "at most 0.99"),
    ("model.attention_probs_dropout_prob", "1e-30", "must be 0 or at least 1e-05"),
    ("model.attention_probs_dropout_prob", "nan", NUMBER),
    ("model.max_position_embeddings", "0", "must be at least 1"),
    ("model.type_vocab_size", "0", "must be at least 1"),
    ("model.type_vocab_size", "1", "must be at least 2 for objective.pairs"),
    ("model.initializer_range", "0", "must be above 0"),
    ("model.initializer_range", "-0.02", "must be above 0"),
    ("model.initializer_range", "1e999", "finite"),
    ("model.layer_norm_eps", "0", "must be above 0"),
    ("model.layer_norm_eps", "1e", NUMBER),
    ("model.pad_token_id", "-1", "must be at least 0"),
    ("model.pad_token_id", "1003", "below model.vocab_size (1003)"),
    ("model.tie_word_embeddings", "yes", TRUTH),
    ("model.tie_word_embeddings", "off", TRUTH),
    ("model.tie_word_embeddings", "1", TRUTH),
    ("model.tie_word_embeddings", "'true'", TRUTH),
    ("model.tie_word_embeddings", "null", TRUTH),
    ("model.weights", "3", TEXT),
    ("model.weights", "''", "must not be empty"),
    ("data.corpus", "null", TEXT),
    ("data.corpus", "2026", TEXT),
    ("data.corpus", "[]", TEXT),
    ("data.corpus", "[a, 7]", TEXT),
    ("data.corpus", "[a, [b]]", TEXT),
    ("data.corpus", "[a, b, a]", "must name each corpus once"),
    ("data.weights", "[1, x]", NUMBER),
    ("data.weights", "[0.5, 0.5]", "must hold a share above 0 for each of the 1 corpora"),
    ("data.weights", "0", "must hold a share above 0"),
    ("data.corpus", "'  '", "must not be empty"),
    ("data.corpus", '"a\\nb"', "printable"),
    ("data.corpus", '"a\\0b"', "printable"),
    ("data.tokenizer", "true", TEXT),
    ("data.tokenizer", "1.5", TEXT),
    ("data.lowercase", "on", TRUTH),
    ("data.lowercase", "0", TRUTH),
    ("data.split", "96", "list of 3 numbers"),
    ("data.split", "[96, 4]", "list of 3 numbers"),
    ("data.split", "[90, 4, 3, 3]", "list of 3 numbers"),
    ("data.split", "96,4,0", "list of 3 numbers"),
    ("data.split", "[96, 4, none]", NUMBER),
    ("data.split", "[96, 4, true]", NUMBER),
    ("data.split", "[.inf, 4, 0]", "finite"),
    ("data.split", "[0, 4, 96]", "the first one (training) above 0"),
    ("data.split", "[104, -4, 0]", "shares of at least 0"),
    ("data.split", "[96, 4, -1]", "shares of at least 0"),
    ("data.split", "[96, 0, 4]", "leave documents for validation"),
    ("data.sequence_length", "7", "must be at least 8"),
    ("data.sequence_length", "65", "max_position_embeddings (64)"),
    ("data.sequence_length", "64.5", INTEGER),
    ("objective.pairs", "order", "must be nsp, sop or none"),
    ("objective.pairs", "[nsp]", "must be nsp, sop or none"),
    ("objective.pairs", "null", "must be nsp, sop or none"),
    ("objective.short_sequences", "1.1", "at most 1"),
    ("objective.short_sequences", "-1", "must be at least 0"),
    ("objective.masking.probability", "0", "must be above 0"),
    ("objective.masking.probability", "1", "below 1"),
    ("objective.masking.probability", "15", "below 1"),
    ("objective.masking.mask_share", "1.01", "at most 1"),
    ("objective.masking.mask_share", "0.91", "plus objective.masking.random_share (0.1) must be at most 1"),
    ("objective.masking.random_share", "-0.1", "must be at least 0"),
    ("objective.masking.random_share", "eighty", NUMBER),
    ("objective.masking.whole_words", "y", TRUTH),
    ("objective.masking.longest_span", "0", "must be at least 1"),
    ("objective.masking.longest_span", "65", "at most 64"),
    ("objective.masking.span_lengths", "uniform", "must be inverse or geometric"),
    ("objective.masking.span_lengths", "geometric", "needs objective.masking.longest_span above 1, which is 1"),
    ("objective.masking.span_stop", "0", "must be above 0"),
    ("objective.masking.span_stop", "1", "below 1"),
    ("objective.masking.maximum", "0", "must be at least 1"),
    *BAD_OPTIMIZER,
    ("parallel.tensor", "0", "must be at least 1"),
    ("parallel.tensor", "3", "must divide model.num_attention_heads (4)"),
    ("parallel.tensor", "5", "must divide model.intermediate_size (96)"),
    ("parallel.pipeline", "0", "must be at least 1"),
    ("parallel.pipeline", "6", "must not be above model.num_hidden_layers (5)"),
    ("parallel.schedule", "pipedream", "must be gpipe, 1f1b, interleaved, zb-h1, zb-v or file"),
    ("parallel.schedule", "1F1B", "must be gpipe, 1f1b, interleaved, zb-h1, zb-v or file"),
    ("parallel.schedule_file", "mine.txt", "is given, but parallel.schedule is 1f1b"),
    ("parallel.virtual", "0", "must be at least 1"),
    ("parallel.virtual", "2", "must be 1 where parallel.schedule is 1f1b"),
    ("parallel.sequence", "split", TRUTH),
    ("parallel.overlap_messages", "1", TRUTH),
    ("parallel.shard_optimizer", "'true'", TRUTH),
    ("parallel.recompute", "attention", "must be none, selective or full"),
    ("parallel.recompute_every", "0", "must be at least 1"),
    ("parallel.recompute_every", "2", "but parallel.recompute is none"),
    ("parallel.microbatch", "0", "must be at least 1"),
    ("parallel.microbatch", "auto", INTEGER),
    ("parallel.microbatch", "null", "is required where parallel.packing is none"),
    ("parallel.packing", "yes", "must be none, bins or packed"),
    ("parallel.microbatch_tokens", "7", "must be at least 8"),
    ("parallel.bucket_megabytes", "0", "must be at least 1"),
    ("parallel.bucket_megabytes", "4097", "at most 4096"),
    *BAD_RUN,
]

REQUIRED = [path for path, row in all_settings(Config).items() if row.is_required]
REQUIRED_BY_A_RULE = {"parallel.microbatch"}
MISSPELT = [
    ("model.hidden_sise", "48", "model.hidden_size"),
    ("model.layers", "5", "model.num_hidden_layers"),
    ("optimizer.hidden_size", "48", "model.hidden_size"),
    ("model.learning_rate", "1e-4", "optimizer.learning_rate"),
    ("run.masking.probability", "0.2", "objective.masking"),
    ("objective.probability", "0.2", "objective.masking.probability"),
    ("objective.masking.probabilty", "0.2", "objective.masking.probability"),
    ("paralel.tensor", "2", "parallel"),
    ("optimizer.warmup_step", "5", "optimizer.warmup_steps"),
    ("model.num_layers", "5", "model.num_hidden_layers"),
    ("data.seq_length", "64", "data.sequence_length"),
]


def problem_of(message: str, path: str, rule: str) -> str:
    """The one problem of a message that names ``path`` and ``rule``."""
    problems = re.split(r"\n(?=  \S)", message)[1:]
    found = [problem for problem in problems if problem.split()[0] == path and rule in problem]
    assert len(found) == 1, message
    return found[0]


@pytest.mark.parametrize(("path", "text", "rule"), BAD, ids=[f"{path}={text[:24]}" for path, text, _ in BAD])
def test_one_bad_value_is_told_with_path_line_rule_and_way_out(
    complaint: Complaint, path: str, text: str, rule: str
):
    started = time.process_time()
    problem = problem_of(complaint({path: text}), path, rule)
    assert time.process_time() - started < 1
    assert re.search(r"settings\.yaml:\d+\)", problem)
    assert re.search(r"\n      -> \S.{2,}", problem)


def test_table_breaks_every_setting_and_has_more_than_a_hundred_rows():
    assert {path for path, _, _ in BAD} == set(all_settings(Config))
    assert len(set(BAD)) == len(BAD) > 100


@pytest.mark.parametrize("path", REQUIRED)
def test_missing_required_setting_is_told(complaint: Complaint, path: str):
    section, _, name = path.rpartition(".")
    message = complaint({path: None})
    blamed = section if f"  {section}\n" in message else path
    assert name in problem_of(message, blamed, "require")


def test_section_without_any_required_setting_is_one_problem(complaint: Complaint):
    message = complaint({"data.corpus": None, "data.tokenizer": None})
    assert message.startswith("1 problem ")
    assert "requires corpus and tokenizer" in message


@pytest.mark.parametrize("path", sorted(set(all_settings(Config)) - set(REQUIRED) - REQUIRED_BY_A_RULE))
def test_setting_with_a_default_may_be_left_out(load: Callable[..., Config], path: str):
    assert load({"model.max_position_embeddings": "512", path: None})


@pytest.mark.parametrize(("path", "text", "meant"), MISSPELT)
def test_unknown_setting_gets_a_suggestion_across_sections(complaint: Complaint, path: str, text: str, meant: str):
    message = complaint({path: text})
    assert "is no setting" in message
    assert re.search(rf"did you mean (.* or )?{re.escape(meant)}( or .*)?\?", message)


@pytest.mark.parametrize("packing", ["bins", "packed"])
def test_packing_needs_room_for_a_sample_instead_of_a_microbatch(load, complaint: Complaint, packing: str):
    packed = {"parallel.packing": packing, "parallel.microbatch": None, "optimizer.global_batch": "61"}
    for tokens in (None, "56"):
        message = complaint({**packed, "parallel.microbatch_tokens": tokens})
        problem = problem_of(message, "parallel.microbatch_tokens", "")
        assert "must be at least data.sequence_length (64)" in problem
    assert load({**packed, "parallel.microbatch_tokens": "64"}).parallel.microbatch is None


def test_blend_has_a_weight_for_each_corpus(load, complaint: Complaint):
    assert load({"data.corpus": "[a, b]", "data.weights": "[2, 1]"}).data.weights == (2.0, 1.0)
    assert load({"data.corpus": "[a, b]"}).data.corpus == ("a", "b")
    for weights in ("[1]", "[1, 0]", "[1, 1, 1]"):
        message = complaint({"data.corpus": "[a, b]", "data.weights": weights})
        assert problem_of(message, "data.weights", "a share above 0 for each of the 2 corpora of data.corpus")


def test_unknown_setting_like_no_other_lists_its_section(complaint: Complaint):
    assert "parallel holds tensor, sequence, pipeline, schedule" in complaint({"parallel.xyzzy": "1"})


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"optimizer.steps": "2e6"}, "write 2000000"),
        ({"model.vocab_size": "30_522"}, "write 30522"),
        ({"model.vocab_size": "30,522"}, "write 30522, without"),
        ({"model.vocab_size": "30,5"}, "-> choose entries of the vocabulary"),
        ({"optimizer.learning_rate": "0,001"}, "write 0.001, with a point"),
        ({"optimizer.learning_rate": "00,05"}, "write 0.05, with a point"),
        ({"optimizer.learning_rate": "1,5e-3"}, "write 1.5e-3, with a point"),
        ({"optimizer.clip_norm": "1,000"}, "write 1000 if the comma parts thousands, or 1.000 if decimals"),
        ({"run.timeout_seconds": "1,000,000"}, "write 1000000, without"),
        ({"model.tie_word_embeddings": "yes"}, "write true"),
        ({"data.lowercase": "off"}, "write false"),
        ({"data.corpus": "2026"}, "put it in quotes: '2026'"),
        ({"model.hidden_size": "50"}, "use 48 or 52, or heads that work: 1, 2, 5, 10, 25, 50"),
        ({"parallel.tensor": "3"}, "tensor sizes that work: 1, 2, 4"),
        ({"optimizer.global_batch": "60"}, "use 56 or 64, or parallel.microbatch: 1, 2, 3, 4, 5, 6, 10"),
        ({"run.stop_after": "4 hours"}, "write it like 3h50m, 45m, 90s or 1d12h"),
        ({"run.step_timeout_seconds": "700"}, "use at most 600, or raise run.timeout_seconds to 700"),
        ({"data.sequence_length": "65"}, "use at most 64, or raise model.max_position_embeddings to 65"),
    ],
)
def test_way_out_names_values_that_work(complaint: Complaint, changes: dict[str, str], hint: str):
    assert hint in complaint(changes)


def test_all_problems_are_told_at_once(complaint: Complaint):
    changes = {
        "model.vocab_size": "many",
        "model.hidden_size": "50",
        "model.hiden_act": "gelu",
        "data.corpus": None,
        "optimizer.learning_rate": "-1",
        "optimizer.warmup_steps": "200",
        "parallel.tensor": "3",
        "run.device": "tpu",
    }
    message = complaint(changes, "run.log_every=0", "objective.masking.mask_share=0.95", world=7)
    for path, rule in [
        ("model.vocab_size", INTEGER),
        ("model.hidden_size", "multiple"),
        ("model.hiden_act", "is no setting"),
        ("data.corpus", "is required"),
        ("optimizer.learning_rate", "above 0"),
        ("optimizer.warmup_steps", "optimizer.steps"),
        ("parallel.tensor", "divide"),
        ("run.device", "must be"),
        ("run.log_every", "at least 1"),
        ("objective.masking.mask_share", "at most 1"),
        ("world", "multiple of 6"),
    ]:
        problem_of(message, path, rule)
    assert message.startswith("11 problems in the settings of ")


def test_long_values_are_cut_short(complaint: Complaint):
    lines = complaint({"data.corpus": "[" + "a, " * 500 + "a]"}).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) < 200


@pytest.mark.parametrize("row", all_settings(Config).values(), ids=lambda row: row.path)
def test_no_setting_takes_a_mapping_or_an_alien_kind(complaint: Complaint, row):
    assert row.path in complaint({row.path: "{a: 1}"})
    if not is_optional(row.kind):
        assert row.path in complaint({row.path: "null"})
    if name_of(row.kind) != "true | false":
        assert row.path in complaint({row.path: "true"})


@pytest.mark.parametrize(
    "row", [row for row in all_settings(Config).values() if row.bounds], ids=lambda row: row.path
)
def test_bounds_of_the_schema_are_kept_at_the_very_edge(row):
    steps = {"at_least": (0, -1), "above": (1, 0), "at_most": (0, 1), "below": (-1, 0)}
    for name, limit in row.bounds.items():
        inside, outside = steps[name]
        tiny = 1 if row.kind is int else 1e-9
        assert row.allows(limit + inside * tiny)
        assert not row.allows(limit + outside * tiny)


@pytest.mark.parametrize(("mask_share", "random_share"), [(0.7, 0.3), (0.9, 0.1), (1, 0), (0, 1), (0.35, 0.65)])
def test_shares_may_add_up_to_exactly_one(load: Callable[..., Config], mask_share: float, random_share: float):
    masking = load({}, f"objective.masking={{mask_share: {mask_share}, random_share: {random_share}}}")
    assert masking.objective.masking.random_share == random_share


def test_split_without_validation_is_fine_when_nothing_is_evaluated(load: Callable[..., Config]):
    config = load({"data.split": "[100, 0, 0]", "run.evaluation_samples": "0"})
    assert config.data.split == (100.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"parallel.schedule": "zb-v"}, "must be 2 where parallel.schedule is zb-v"),
        ({"parallel.schedule": "zb-h1", "parallel.virtual": "2"}, "must be 1 where parallel.schedule is zb-h1"),
        ({"parallel.schedule": "file"}, "is required where parallel.schedule is file"),
        (
            {"parallel.schedule": "interleaved", "parallel.virtual": "6"},
            "x parallel.virtual (6) must not be above model.num_hidden_layers (5)",
        ),
    ],
)
def test_schedule_and_stages_must_fit(complaint, values, rule):
    text = complaint(values)
    assert text.startswith("1 problem in the settings")
    assert rule in text
