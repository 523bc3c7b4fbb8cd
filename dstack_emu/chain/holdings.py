"""What dstack's contracts hold now: lists, settings, owners and implementations, as JSON, read through any node."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dstack_emu.chain import abi
from dstack_emu.chain.contracts import AppContract, Contract, ContractError, KmsContract
from dstack_emu.chain.operations import APP_SETTINGS, implementation_of, pending_owner
from dstack_emu.chain.policy import AppPolicy, read_policy
from dstack_emu.chain.quantities import checksummed, data
from dstack_emu.chain.transaction import created_address


async def read_holdings(kms: KmsContract) -> dict[str, Any]:
    """Return what DstackKms and its registered apps hold; raise `ChainError`.

    Addresses have their checksum, hashes 0x. A registered app that is no DstackApp has a `problem` in place of the
    rest.
    """
    policy = await read_policy(kms.ask, kms.address)
    return {
        "kms": {
            **await _of_contract(kms),
            "app_implementation": checksummed(await kms.app_implementation()),
            "gateway_app_id": policy.gateway_app_id,
            "os_images": _sorted(policy.os_images),
            "kms_measurements": _sorted(policy.kms_measurements),
            "kms_devices": _sorted(policy.kms_devices),
            "info": {name: value.hex() for name, value in asdict(await kms.info()).items()},
        },
        "apps": {
            checksummed(app_id): await _of_app(AppContract(kms.ask, app_id), app) for app_id, app in policy.apps.items()
        },
        "next_app_id": checksummed(await next_app_id(kms)),
    }


async def next_app_id(kms: KmsContract) -> bytes:
    """Return the address that the next app of the factory gets."""
    nonce = int(await kms.ask("eth_getTransactionCount", [data(kms.address), "latest"]), 16)
    return created_address(kms.address, nonce)


async def _of_contract(contract: Contract) -> dict[str, Any]:
    pending = await pending_owner(contract)
    return {
        "address": checksummed(contract.address),
        "owner": checksummed(await contract.owner()),
        "pending_owner": None if pending is None else checksummed(pending),
        "implementation": await implementation_of(contract),
    }


async def _of_app(app: AppContract, policy: AppPolicy) -> Mapping[str, Any]:
    try:
        settings = {name.replace("-", "_"): await app.view(view, "(bool)") for name, (view, _) in APP_SETTINGS.items()}
        found = await _of_contract(app)
    except ContractError as error:  # a registered app may be any contract
        return {"address": checksummed(app.address), "problem": str(error)}
    return {
        **found,
        "compose_hashes": _sorted(policy.compose_hashes),
        "devices": _sorted(policy.devices),
        **settings,
        "upgrades_disabled": await _are_upgrades_disabled(app),
    }


async def _are_upgrades_disabled(app: AppContract) -> bool:
    """Look for the event: no view of the contract says it."""
    wanted = {"fromBlock": "0x0", "address": data(app.address), "topics": [data(abi.topic("UpgradesDisabled()"))]}
    return bool(await app.ask("eth_getLogs", [wanted]))


def _sorted(values: frozenset[bytes]) -> list[str]:
    return [data(each) for each in sorted(values)]
