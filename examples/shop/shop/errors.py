"""Why the shop refuses."""


class ShopError(Exception):
    """Ends a command; its transaction is rolled back."""

    status = 409


class UnknownOrderError(ShopError):
    status = 404

    def __init__(self, number: str) -> None:
        super().__init__(f"There is no order {number!r}.")


class UnknownSkuError(ShopError):
    status = 404

    def __init__(self, sku: str) -> None:
        super().__init__(f"There is no {sku!r} in this shop.")


class OutOfStockError(ShopError):
    def __init__(self, sku: str) -> None:
        super().__init__(f"There is not enough {sku!r} left.")


class NumberTakenError(ShopError):
    def __init__(self, number: str) -> None:
        super().__init__(f"Order number {number!r} is taken by an order of something else.")
