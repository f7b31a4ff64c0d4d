from dataclasses import dataclass


@dataclass(frozen=True)
class Anomaly:
    step: int
    kind: str
    text: str
    serious: bool


class Detector:
    def __init__(self, ranks):
        pass

    def see(self, step, own, seconds):
        return []

    def back_to(self, step):
        pass
