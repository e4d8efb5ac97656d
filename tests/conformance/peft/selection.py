"""What of PEFT's tests is collected."""


class Selection:
    """To name thousands of tests that are then left out takes longer than to run the others."""

    is_short_run = False
