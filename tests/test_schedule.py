import math

import pytest
from timm.scheduler import PolyLRScheduler
import torch

from schedule import Schedule, cosine, polynomial, ramp, warmup


def test_curves():
    assert [round(polynomial(p), 4) for p in (0, .25, .5, .75, 1)] == [1, .9375, .75, .4375, 0]
    assert [round(cosine(p), 4) for p in (0, .25, .5, .75, 1)] == [1, .8536, .5, .1464, 0]
    assert all(polynomial(p / 100) > cosine(p / 100) for p in range(1, 100))
    # MoCo-v3's momentum at 0, 25, 50, 75, 100 %
    assert [round(ramp(0.99, 1, p), 8) for p in (0, .25, .5, .75, 1)] == [.99, .99146447, .995, .99853553, 1]
    # DINO's weight decay
    assert [round(ramp(0.04, 0.4, p), 6) for p in (0, .25, .5, .75)] == [.04, .092721, .22, .347279]
    assert [warmup(p, 0.2) for p in (0, 0.1, 0.2, 0.9)] == [0, 0.5, 1, 1] and warmup(0, 0) == 1


@pytest.mark.parametrize('alpha', (1, 2, 3))
def test_polynomial_equals_timm(alpha):
    scheduler = PolyLRScheduler(torch.optim.SGD([torch.zeros(1)], lr=1.0), t_initial=100, power=1.0, k_decay=alpha)
    for t in range(100):
        assert abs(scheduler._get_lr(t)[0] - polynomial(t / 100, alpha)) < 1e-9


def test_schedule_at_and_text():
    schedule = Schedule.parse('p8-drop0.50@0, p8@0.25,p4@0.7')
    assert [schedule.at(p) for p in (0, 0.2499, 0.25, 0.6999, 0.7, 1)] == ['p8-drop0.50', 'p8-drop0.50', 'p8', 'p8', 'p4', 'p4']
    assert Schedule.parse(str(schedule)) == schedule == Schedule.from_json(schedule.to_json())
    assert Schedule.parse('p8').at(0.5) == 'p8'


@pytest.mark.parametrize('text', ['p8@0.1', 'p8@0,p4@0', 'p8@0,p4@0.9,p2@0.5', 'p8@0,p4@1', 'p8@x', 'p8@0,p4@-1', 'p8@0,p4@nan'])
def test_schedule_refuses(text):
    with pytest.raises(ValueError, match='schedule|stages'):
        Schedule.parse(text)
