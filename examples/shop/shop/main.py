"""The shop over HTTP. Database and broker come from CQRS_DECOR_DATABASE and CQRS_DECOR_BROKER.

uvicorn shop.main:app
CQRS_DECOR_APP=shop.main:cqrs cqrs-decor run all
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from cqrs_decor import bootstrap
from shop.errors import ShopError
from shop.messages import CancelOrder, GetOrder, OrderView, PlaceOrder

cqrs = bootstrap(service="shop", discover=["shop"])


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """The web process only sends: relay and worker are processes of their own."""
    async with cqrs:
        yield


app = FastAPI(title="Shop", lifespan=lifespan)


@app.exception_handler(ShopError)
async def refuse(_: Request, error: ShopError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=error.status)


@app.post("/orders", status_code=201)
async def place_order(command: PlaceOrder) -> OrderView:
    """A command is a pydantic model: FastAPI answers 422 to what does not fit it."""
    return await cqrs.send(command)


@app.get("/orders/{number}")
async def get_order(number: str) -> OrderView:
    return await cqrs.ask(GetOrder(number=number))


@app.delete("/orders/{number}")
async def cancel_order(number: str) -> OrderView:
    return await cqrs.send(CancelOrder(number=number))
