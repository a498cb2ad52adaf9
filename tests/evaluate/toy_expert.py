"""A script behind a policy's interface that plays the toy world perfectly."""

from collections.abc import Sequence

import numpy as np

from fusevla.data.prompts import parse_thought, plan_thought
from fusevla.data.toy import expert, subgoal
from fusevla.evaluate.toy_env import ToyEnv
from fusevla.evaluate.toy_rollout import ToyArena
from fusevla.policy.policy import Query, Reply


class Expert:
    """Does what its thought says, with a world of its own that it moves along: a policy that sees perfectly."""

    def __init__(self, batch_size: int, wrong: bool = False) -> None:
        self.batch_size, self.wrong = batch_size, wrong
        self.worlds: dict[int, ToyEnv] = {}

    def __call__(self, queries: Sequence[Query]) -> list[Reply]:
        return [self.answer(query) for query in queries]

    def answer(self, query: Query) -> Reply:
        seed = query.seed[0]
        if query.agent.queries == 0:
            self.worlds[seed] = ToyEnv()
            self.worlds[seed].reset(seed=seed)
        env = self.worlds[seed]
        info = env._info()
        thought = parse_thought(query.agent.thought or "")
        if thought is None or len(thought.done) != info["placed"]:
            plans = info["plans"][::-1] if self.wrong else info["plans"]
            text = plan_thought(plans, info["placed"])
            return Reply(query.agent.after_thought(text, True), thought=text)
        target = [subgoal(color) for color in info["colors"]].index(thought.now)
        actions = []
        for _ in range(ToyArena.executed):
            actions.append(expert(env._world, target))
            env.step(actions[-1])
        return Reply(query.agent.after_action(), actions=np.array([*actions, *actions], np.float32))
