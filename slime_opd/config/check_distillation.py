"""Rules between the options of distillation: teacher, divergence, off-policy responses, weights."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from slime_opd import schedule
from slime_opd.config.config import Config
from slime_opd.config.options import flag
from slime_opd.config.redact import redact_urls


def check_opd_has_rollouts(config: Config) -> list[str]:
    """Distillation in a run that generates nothing to score."""
    if config.opd.use_opd and config.is_sft:
        return ["--use-opd scores the student's rollouts, and --loss-type sft_loss has none: drop one of the two"]
    return []


def check_teacher_address(config: Config) -> list[str]:
    """An address of the teacher's server that is malformed."""
    url = config.reward.rm_url
    if url is None or not config.teacher.scores_rollouts or _is_server_address(url):
        return []
    return [
        f"--rm-url: found {redact_urls(url.partition('?')[0])!r}, expected the server's address, http://HOST:PORT or http://HOST:PORT/generate"
    ]


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


def check_divergence(config: Config) -> list[str]:
    """A divergence that is given twice, or needs scores that its teacher does not have."""
    options, problems = config.divergence, []
    if not config.opd.use_opd or not config.has_divergence:
        return []
    if options.opd_schedule is not None and options.opd_divergence is not None:
        problems.append("--opd-divergence and --opd-schedule: found both, expected one")
    problems += _problems_of_text("opd_schedule", options.opd_schedule, schedule.parse_stages)
    top_k = options.opd_log_prob_top_k
    if config.teacher.scores_rollouts and not config.teacher.has_whole_vocabulary and top_k < 1:
        problems.append(
            "--opd-divergence with --opd-type sglang needs --opd-log-prob-top-k: a server sends its most likely tokens, not its whole vocabulary; give a number such as 16, or use --opd-type megatron"
        )
    elif "token_reward_direct" in config.divergence_kinds and top_k < 1:
        problems.append("--opd-divergence token_reward_direct needs --opd-log-prob-top-k: the tokens that it rewards")
    if options.opd_divergence == "token_reward_direct" and options.opd_top_k_remainder != "tail":
        problems.append(
            f"--opd-top-k-remainder {options.opd_top_k_remainder} has no effect with --opd-divergence token_reward_direct, which has no term for the mass outside its tokens"
        )
    return problems


def check_opd_temperature(config: Config) -> list[str]:
    """A temperature at which the teacher does not score."""
    fixed, temperature = config.teacher.fixed_temperature, config.divergence.opd_temperature
    if fixed is not None and temperature not in (None, fixed):
        return [
            f"--opd-temperature {temperature} with --opd-type sglang: a server always scores at temperature 1; drop it, or use --opd-type megatron"
        ]
    return []


def check_opd_coef_ramp(config: Config) -> list[str]:
    """A ramp that cannot be read."""
    return _problems_of_text("opd_coef_ramp", config.divergence.opd_coef_ramp, schedule.parse_ramp)


def check_off_policy(config: Config) -> list[str]:
    """Off-policy responses that the run's teacher cannot generate."""
    options = config.divergence
    if not config.opd.use_opd or not _has_off_policy(config):
        return []
    if options.opd_off_policy_source == "teacher" and not config.teacher.can_generate:
        return [
            "--opd-off-policy-source teacher needs --opd-type sglang: a Megatron teacher does not generate; use --opd-off-policy-source dataset"
        ]
    return []


def check_distillation_weights(config: Config) -> list[str]:
    """Weights by correctness in a run without rewards."""
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
        f"{flag(name)} needs a reward (--rm-type, --custom-rm-path): without one no response is correct or wrong"
        for name, value in (("opd_reward_beta", options.opd_reward_beta), ("opd_pass_rate_weights", rates))
        if value and not config.has_reward
    ]
    return problems


def _has_off_policy(config: Config) -> bool:
    return config.divergence.opd_off_policy_fraction > 0


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
