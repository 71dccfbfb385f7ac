"""Rules about distillation: its teacher, its divergence, and what weighs how much.

Each rule is a pure function from a Config to the sentences that say what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from slime_opd import schedule
from slime_opd.config.config import Config
from slime_opd.config.options import flag, options_of
from slime_opd.config.redact import redact_urls

# Options that only a divergence, or only one over top-k tokens, reads.
_OF_DIVERGENCE = (
    "opd_divergence_coef",
    "opd_jsd_beta",
    "opd_log_prob_top_k",
    "opd_reward_weight_mode",
    "opd_off_policy_fraction",
)
_OF_TOP_K = ("opd_top_k_strategy", "opd_top_k_remainder", "opd_wire_dtype")
_OF_MEGATRON_TEACHER = ("opd_teacher_resident", "opd_teacher_hidden_on_host")
_OF_PENALTY = ("opd_kl_clamp", "opd_kl_discount", "opd_refresh_student")


def check_opd_type(config: Config) -> list[str]:
    """A distillation that does not say who its teacher is, or that has no rollouts."""
    opd = config.opd
    if opd.use_opd and config.is_sft:
        return ["--use-opd scores the student's rollouts, and --loss-type sft_loss has none: drop one of the two"]
    if opd.use_opd and opd.opd_type is None:
        return [
            "--opd-type must be given with --use-opd: found none, expected sglang (a teacher server at --rm-url) or megatron (a teacher checkpoint at --opd-teacher-load)"
        ]
    return []


def check_opd_is_on(config: Config) -> list[str]:
    """Options of a distillation that is not on."""
    if config.opd.use_opd:
        return []
    return [
        f"{option.flag} is set but --use-opd is not: add --use-opd, or drop it"
        for option in options_of(Config).values()
        if option.stage in ("opd", "divergence") and option.read(config) != option.default
    ]


def check_megatron_teacher(config: Config) -> list[str]:
    """A teacher checkpoint that is missing, or that no one would load."""
    opd = config.opd
    if not opd.use_opd:
        return []
    if opd.opd_type == "megatron" and opd.opd_teacher_load is None:
        return ["--opd-teacher-load is required with --opd-type megatron: the teacher's checkpoint directory"]
    if opd.opd_type == "sglang" and opd.opd_teacher_load is not None:
        return [
            f"--opd-teacher-load {opd.opd_teacher_load} must not be given with --opd-type sglang, whose teacher is the server at --rm-url: drop it, or use --opd-type megatron"
        ]
    if opd.opd_teacher_ckpt_step is not None and opd.opd_teacher_load is None:
        return ["--opd-teacher-ckpt-step has no effect without --opd-teacher-load"]
    return []


def check_sglang_teacher(config: Config) -> list[str]:
    """A teacher's address that is missing, malformed, or that no one would ask."""
    url = config.reward.rm_url
    if config.has_sglang_teacher and url is None:
        return ["--rm-url is required with --opd-type sglang: the teacher's endpoint, http://HOST:PORT/generate"]
    if url is None:
        return []
    if not config.opd.use_opd or config.has_megatron_teacher:
        return ["--rm-url is the endpoint of an SGLang teacher: it has no effect without --use-opd --opd-type sglang"]
    if not _is_server_address(url):
        return [
            f"--rm-url: found {redact_urls(url.partition('?')[0])!r}, expected the server's address, http://HOST:PORT or http://HOST:PORT/generate"
        ]
    return []


def check_sampling_of_opd(config: Config) -> list[str]:
    """Sampling that changes one side of the KL and not the other."""
    if not config.opd.use_opd:
        return []
    return [
        f"{flag(name)} {found} with --use-opd: sampled from a part of the vocabulary, the student's log-probs are of that part and the teacher's of all of it, so their difference is no KL; expected {whole}"
        for name, found, whole in (
            ("rollout_top_p", config.rollout.rollout_top_p, 1.0),
            ("rollout_top_k", config.rollout.rollout_top_k, -1),
        )
        if found != whole
    ]


def check_options_have_an_effect(config: Config) -> list[str]:
    """Options of a part that is not there."""
    if not config.opd.use_opd:
        return []
    top_k = config.divergence.opd_log_prob_top_k
    parts = (
        (_OF_DIVERGENCE, config.has_divergence, "without --opd-divergence or --opd-schedule"),
        (_OF_TOP_K, top_k > 0, "without --opd-log-prob-top-k: the divergence is over the whole vocabulary"),
        (_OF_MEGATRON_TEACHER, config.has_megatron_teacher, "without --opd-type megatron"),
        (_OF_PENALTY, config.penalty_coefficient > 0, "on a penalty of weight 0: give --opd-kl-coef"),
        (
            ("opd_reward_weight_mode",),
            "token_reward_direct" in _kinds(config),
            "without --opd-divergence token_reward_direct",
        ),
        (("opd_jsd_beta",), "jsd" in _kinds(config), "without --opd-divergence jsd"),
        (
            ("opd_off_policy_source", "opd_off_policy_unit", "opd_off_policy_key"),
            _mixes(config),
            "without --opd-off-policy-fraction",
        ),
        (
            ("opd_token_keep_fraction",),
            config.divergence.opd_token_weighting == "top",
            "without --opd-token-weighting top",
        ),
    )
    options = options_of(Config)
    found = {
        name: f"{flag(name)} {_said(options[name].read(config))}has no effect {why}".replace("  ", " ")
        for names, is_there, why in reversed(parts)
        for name in names
        if not is_there and options[name].read(config) != options[name].default
    }
    return list(found.values())


def check_divergence(config: Config) -> list[str]:
    """A divergence that is named twice, or whose parts its teacher cannot give."""
    options, problems = config.divergence, []
    if not config.opd.use_opd or not config.has_divergence:
        return []
    if options.opd_schedule is not None and options.opd_divergence is not None:
        problems.append("--opd-divergence and --opd-schedule: found both, expected one")
    problems += _problems_of_text("opd_schedule", options.opd_schedule, schedule.parse_stages)
    top_k = options.opd_log_prob_top_k
    if config.has_sglang_teacher and top_k < 1:
        problems.append(
            "--opd-divergence with --opd-type sglang needs --opd-log-prob-top-k: a server sends its most likely tokens, not its whole vocabulary; give a number such as 16, or use --opd-type megatron"
        )
    elif "token_reward_direct" in _kinds(config) and top_k < 1:
        problems.append("--opd-divergence token_reward_direct needs --opd-log-prob-top-k: the tokens that it rewards")
    if options.opd_divergence == "token_reward_direct" and options.opd_top_k_remainder != "tail":
        problems.append(
            f"--opd-top-k-remainder {options.opd_top_k_remainder} has no effect with --opd-divergence token_reward_direct, which has no term for the mass outside its tokens"
        )
    if "jsd" in _kinds(config) and not 0 < options.opd_jsd_beta < 1:
        problems.append(
            f"--opd-jsd-beta: found {options.opd_jsd_beta}, expected a number between 0 and 1, both excluded: at either end the divergence is 0; use --opd-divergence forward_kl or reverse_kl"
        )
    return problems


def check_opd_temperature(config: Config) -> list[str]:
    """A temperature that a teacher server does not score at."""
    asked = config.divergence.opd_temperature
    if config.has_sglang_teacher and asked not in (None, 1.0):
        return [
            f"--opd-temperature {asked} with --opd-type sglang: a server scores at temperature 1 whatever it is asked; drop it, or use --opd-type megatron"
        ]
    return []


def check_opd_coef_ramp(config: Config) -> list[str]:
    """A ramp that cannot be read."""
    return _problems_of_text("opd_coef_ramp", config.divergence.opd_coef_ramp, schedule.parse_ramp)


def check_off_policy(config: Config) -> list[str]:
    """Responses of another model that nobody could write."""
    options = config.divergence
    if not config.opd.use_opd or not _mixes(config):
        return []
    if options.opd_off_policy_source == "dataset" and options.opd_off_policy_key is None:
        return ["--opd-off-policy-source dataset needs --opd-off-policy-key: the column of the responses"]
    if options.opd_off_policy_source == "teacher" and not config.has_sglang_teacher:
        return [
            "--opd-off-policy-source teacher needs --opd-type sglang: a Megatron teacher does not generate; use --opd-off-policy-source dataset"
        ]
    if options.opd_off_policy_source == "teacher" and options.opd_off_policy_key is not None:
        return ["--opd-off-policy-key has no effect with --opd-off-policy-source teacher, who writes the responses"]
    return []


def check_distillation_weights(config: Config) -> list[str]:
    """Weights by an answer's being right, without answers."""
    options, problems = config.divergence, []
    if not config.opd.use_opd:
        return []
    rates = options.opd_pass_rate_weights
    if rates and (len(rates) != 2 or min(rates) < 0):
        found = " ".join(f"{rate:g}" for rate in rates)
        problems.append(f"--opd-pass-rate-weights: found {found}, expected two numbers of 0 or more, such as 1 1")
    if rates and config.rollout.n_samples_per_prompt == 1:
        problems.append(
            "--opd-pass-rate-weights with --n-samples-per-prompt 1: one response has no pass rate; sample more"
        )
    problems += [
        f"{flag(name)} needs a reward (--rm-type, --custom-rm-path): without one no answer is right or wrong"
        for name, value in (("opd_reward_beta", options.opd_reward_beta), ("opd_pass_rate_weights", rates))
        if value and not config.has_reward
    ]
    return problems


def _kinds(config: Config) -> set[str | None]:
    """The divergences of the run, as far as they can be read."""
    try:
        stages = schedule.parse_stages(config.divergence.opd_schedule or "")
    except ValueError:
        stages = ()
    return {config.divergence.opd_divergence, *(stage.kind for stage in stages)}


def _mixes(config: Config) -> bool:
    return config.divergence.opd_off_policy_fraction > 0


def _said(value: object) -> str:
    return "" if value is True else f"{value} "


def _problems_of_text(name: str, text: str | None, parse: Callable[[str], object]) -> list[str]:
    if text is None:
        return []
    try:
        parse(text)
    except ValueError as error:
        return [f"{flag(name)}: found {text!r}, {error}"]
    return []


def _is_server_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    has_address = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
    is_plain = not parts.query and not parts.fragment and not any(map(str.isspace, url))
    return has_address and is_plain and (not parts.path.strip("/") or parts.path.rstrip("/").endswith("/generate"))
