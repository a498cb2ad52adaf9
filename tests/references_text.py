"""Naive twins of the text side: read the raw JSON and follow the published rules word by word."""


def choose(record: dict, frame: int, length: int, r1: float, r2: float, keep: float = 0.7, outdated: bool = True) -> tuple:
    """(prompt, target, kind, stay, actions) of a frame, from one episode of a ``cot_simple.json``."""
    for segment in record["segments"]:
        start, end = segment["start_step"], segment["end_step"]
        last = end == -1
        end = length if last else end
        if frame < start or frame >= end:
            continue
        progress = (frame - start) / (end - start)
        content, updated = segment["content"], segment["updated_content"]
        if updated is not None:
            if r1 < 0.8 * (1 - progress) + 0.4 * progress:
                low, high = record["episode_start_interval"]
                if low <= frame < high or r2 < keep:
                    return content, updated, "reason", False, False
                return content, None, "act_outdated", False, True
            return segment.get("updated_content_w_instruction", content), None, "act", last, True
        if outdated and segment.get("outdated_content") is not None and r1 < 0.4 * (1 - progress):
            return segment["outdated_content"], content, "reason_outdated", False, False
        return content, None, "act", False, True
    raise IndexError(frame)


def episode_record(
    task: str = "put the red block in the bowl", plans: tuple = ("grasp the red block", "lift it"), outdated: bool = True
) -> dict:
    """A valid episode of 2P + 1 segments: think over 10 frames, act over 20, ..., the last one open."""
    newline = "\n"

    def thought(done: int) -> str:
        lines = [f"{n}. {plan}" for n, plan in enumerate(plans, 1)]
        finished = newline.join(lines[:done]) or "Nothing."
        now = plans[done] if done < len(plans) else "Nothing. Task complete."
        return f"Plan: {newline.join(lines)}\n What I have done: {finished}\nNow I need to do: {now}\n"

    head = f"Instruction: {task}. \n"
    contents = [f"{head}Plan: TBD.\n What I have done: TBD.\nNow I need to do: TBD.\n"]
    contents += [head + thought(done) for done in range(len(plans) + 1)]
    segments: list[dict[str, object]] = []
    for index in range(len(plans) + 1):
        start = 30 * index
        segments.append(
            {
                "start_step": start,
                "end_step": -1 if index == len(plans) else start + 10,
                "reference_start_step": 0,
                "reference_end_step": max(start, 10),
                "content": contents[index],
                "updated_content": thought(index),
                "updated_content_w_instruction": contents[index + 1],
            }
        )
        if index < len(plans):
            act: dict[str, object] = {
                "start_step": start + 10,
                "end_step": start + 30,
                "reference_start_step": 0,
                "reference_end_step": start + 10,
            }
            act |= {"content": contents[index + 1], "updated_content": None}
            if index and outdated:
                act |= {
                    "outdated_content": contents[index],
                    "outdated_reference_start_step": 10,
                    "outdated_reference_end_step": 30,
                }
            segments.append(act)
    return {"episode_start_interval": [0, 10], "segments": segments}
