"""The chain, as web3.py sees it: transactions, events, past states, errors, methods for tests."""

from collections.abc import Iterator

import pytest
from web3.exceptions import ContractCustomError, ContractLogicError

from tests.chains import LiveChain, running_chain

IMAGE = bytes.fromhex("11" * 32)


@pytest.fixture(scope="module")
def shared_chain() -> Iterator[LiveChain]:
    """One chain for all tests of this file."""
    with running_chain() as chain:
        yield chain


@pytest.fixture
def chain(shared_chain: LiveChain) -> LiveChain:
    """The chain as it began."""
    shared_chain.reset()
    return shared_chain


def test_allowing_an_image_is_a_transaction_with_an_event(chain: LiveChain) -> None:
    function = chain.kms.functions.addOsImageHash(IMAGE)
    before = chain.web3.eth.block_number
    hash_ = function.transact({"from": chain.owner})
    receipt = chain.web3.eth.wait_for_transaction_receipt(hash_)
    assert (receipt["status"], receipt["blockNumber"]) == (1, before + 1)
    (log,) = chain.kms.events.OsImageHashAdded().get_logs(from_block=0)
    assert (log["args"]["osImageHash"], log["transactionHash"]) == (IMAGE, hash_)
    assert chain.kms.functions.allowedOsImages(IMAGE).call() is True
    assert chain.kms.functions.allowedOsImages(IMAGE).call(block_identifier=before) is False


def test_custom_error_of_a_refused_act_is_decoded(chain: LiveChain) -> None:
    with pytest.raises(ContractCustomError) as refused:
        chain.kms.functions.addOsImageHash(IMAGE).call({"from": chain.accounts[1]})
    expected = "0x118cdaa7" + "00" * 12 + chain.accounts[1][2:].lower()
    assert refused.value.data == expected


def test_text_of_a_refused_act_is_the_message(chain: LiveChain) -> None:
    with pytest.raises(ContractLogicError, match="Invalid app ID"):
        chain.kms.functions.registerApp("0x" + "00" * 20).estimate_gas()


def test_signed_transaction_needs_no_unlocked_account(chain: LiveChain) -> None:
    account = chain.web3.eth.account.from_key(chain.chain.private_keys[0])
    assert account.address == chain.owner
    built = chain.kms.functions.addOsImageHash(IMAGE).build_transaction(
        {"from": account.address, "nonce": chain.web3.eth.get_transaction_count(account.address)}
    )
    hash_ = chain.web3.eth.send_raw_transaction(account.sign_transaction(built).raw_transaction)
    assert chain.web3.eth.get_transaction(hash_)["from"] == account.address
    assert chain.kms.functions.allowedOsImages(IMAGE).call()


def test_revert_returns_to_a_snapshot(chain: LiveChain) -> None:
    snapshot = chain.rpc("evm_snapshot")
    chain.kms.functions.addOsImageHash(IMAGE).transact({"from": chain.owner})
    assert chain.rpc("evm_revert", snapshot) is True
    assert chain.kms.functions.allowedOsImages(IMAGE).call() is False
    assert chain.rpc("evm_revert", snapshot) is False
