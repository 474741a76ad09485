"""Whether the scores of a prediction differ from those that calibrated the model."""

from math import sqrt

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.01  # of the test: the share of reports on unchanged images that name a change
CRITICAL = 1.63  # of Kolmogorov's distribution, at that level


def compare(predicted: NDArray, calibration: NDArray) -> str:
    """Say whether p-values of predicted images, ``(N,)``, differ from those of the calibration's own, ``(M,)``.

    P-values are ranks among the calibration scores: the two-sample Kolmogorov-Smirnov test is that of the scores, at
    the calibration's resolution. A test against the uniform distribution would name changes where there are none,
    because the calibration is a sample too.
    """
    from scipy.stats import ks_2samp

    result = ks_2samp(predicted, calibration)
    test = f"Kolmogorov-Smirnov test with {len(calibration)} calibration images: D = "
    test += f"{result.statistic:.2f}, p = {result.pvalue:.2g}"
    if result.pvalue >= LEVEL:
        unseen = CRITICAL * sqrt(1 / len(predicted) + 1 / len(calibration))
        few = f"A change of fewer than {unseen:.0%} of the images" if unseen < 1 else "With so few images, a change"
        return f"No change was found: scores are spread as in calibration ({test}). {few} may not be found."
    shares = [f"{np.mean(values <= result.statistic_location):.0%}" for values in (predicted, calibration)]
    found = f"{shares[0]} of the images, and {shares[1]} of the calibration images, have p-values of at most "
    found += f"{result.statistic_location:.2g} ({test})"
    if result.statistic_sign > 0:
        return f"Scores are higher than in calibration: {found}. More parts are anomalous, or camera or light changed."
    return f"Scores are lower than in calibration: {found}. Camera or light may have changed; defects may be missed."
