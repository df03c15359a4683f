"""Types that users feel, pinned with assert_type. Read by pyright and mypy."""
