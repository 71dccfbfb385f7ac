"""Five kills of `tools/fault_drill.py`, through the drill's own code: a run that was killed loses nothing and leaves
nothing.
"""

from __future__ import annotations

import pytest
from drill.campaign import Campaign
from drill.kinds import GRPO, KINDS, SFT, Phase
from drill.plan import Trial
from drill.results import FINISHED

pytestmark = pytest.mark.e2e

# One run of fine-tuning, killed three times, ends bit-equal to one that is left alone; one run with an engine and
# reward workers is killed twice. The kinds are those whose failures were the worst: orphans, a hang, steps done again.
KILLS = {
    SFT: [("driver-term", Phase.TRAIN), ("trainer-kill", Phase.SAVE), ("driver-kill", Phase.SAVE)],
    GRPO: [("driver-kill", Phase.GENERATE), ("engine-scheduler-kill", Phase.GENERATE)],
}


def test_killed_runs_lose_nothing_and_leave_nothing_behind(tmp_path):
    batches = [
        (stack, [Trial(number, KINDS[kind], stack, phase, 2, 0.5) for number, (kind, phase) in enumerate(kills)])
        for stack, kills in KILLS.items()
    ]
    with Campaign(tmp_path) as campaign:
        results = campaign.run(batches, jobs=2)
    assert campaign.problems == []
    assert {result.line(): result.problems for result in results if result.problems} == {}
    kills = [result for result in results if result.kind != FINISHED]
    assert sorted(result.kind for result in kills) == sorted(kind for own in KILLS.values() for kind, _ in own)
    assert all(result.steps_known for result in kills)
    assert [result.bit_equal for result in kills if result.stack == SFT] == [True] * 3
    # Both whole runs and the uninterrupted one.
    assert [result.code for result in results if result.kind == FINISHED] == [0, 0, 0]
