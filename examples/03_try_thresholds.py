"""Watch one chain of thought without leaving it, then try policies on its trace: no model runs a second time."""

from langchain_earlyexit import DEER, ChatEarlyExit, CoDEStop, Trace, replay

with ChatEarlyExit(model="pocket", exit_policy=DEER(threshold=1.0), shadow=True, include_checks=True, seed=2) as llm:
    message = llm.invoke("What is 58 * 43?")

trace = Trace.from_dict(message.response_metadata["early_exit"]["trace"])
for check in trace.checks:
    print(check.position, check.cue, check.answer, f"{check.signals['trial_confidence']:.3f}")
for policy in (DEER(threshold=0.5), DEER(threshold=0.9), DEER(threshold=0.99), CoDEStop(tau=2.0)):
    left = replay(policy, trace)
    print(policy, "never leaves" if left is None else f"leaves after {trace.checks[left].position} tokens")
