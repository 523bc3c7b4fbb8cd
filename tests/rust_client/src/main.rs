//! Uses `dstack-emu chain` with alloy, the library of cast and forge: `rust-client URL FOLDER KEY KEY`.
//!
//! FOLDER has the artefacts DstackApp.json and DstackKms.json, and the folder above it ERC1967Proxy.json. The first key
//! owns what is deployed. Prints a line per step; a failure panics.

use std::{env, fs, time::Duration};

use alloy::{
    network::{EthereumWallet, TransactionBuilder},
    primitives::{hex, Address, Bytes, B256, U256},
    providers::{ext::AnvilApi, Provider, ProviderBuilder, WsConnect},
    rpc::types::{BlockId, BlockNumberOrTag, Filter, TransactionRequest},
    signers::local::PrivateKeySigner,
    sol,
    sol_types::{SolCall, SolEvent},
};
use futures_util::StreamExt;

sol! {
    #[sol(rpc)]
    contract Kms {
        event AppDeployedViaFactory(address indexed appId, address indexed deployer);
        event OsImageHashAdded(bytes32 osImageHash);
        error OwnableUnauthorizedAccount(address account);
        function initialize(address initialOwner, address implementation) external;
        function owner() external view returns (address);
        function addOsImageHash(bytes32 osImageHash) external;
        function removeOsImageHash(bytes32 osImageHash) external;
        function allowedOsImages(bytes32 osImageHash) external view returns (bool);
        function registeredApps(address appId) external view returns (bool);
        function deployAndRegisterApp(address initialOwner, bool disableUpgrades, bool requireTcbUpToDate,
            bool allowAnyDevice, bytes32 initialDeviceId, bytes32 initialComposeHash) external returns (address);
    }

    #[sol(rpc)]
    contract App {
        event ComposeHashAdded(bytes32 composeHash);
        function addComposeHash(bytes32 composeHash) external;
        function allowedComposeHashes(bytes32 composeHash) external view returns (bool);
    }
}

const IMAGE: B256 = B256::repeat_byte(0x11);
const COMPOSE_HASH: B256 = B256::repeat_byte(0x22);

fn code(path: String) -> Bytes {
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let artefact: serde_json::Value = serde_json::from_str(&text).expect("an artefact is JSON");
    hex::decode(artefact["bytecode"].as_str().expect("bytecode"))
        .expect("hex")
        .into()
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = env::args().collect();
    let (url, folder) = (&arguments[1], &arguments[2]);
    let keys: Vec<PrivateKeySigner> = arguments[3..5]
        .iter()
        .map(|key| key.parse().expect("a private key"))
        .collect();
    let (owner, other) = (keys[0].address(), keys[1].address());
    let mut wallet = EthereumWallet::from(keys[0].clone());
    wallet.register_signer(keys[1].clone());
    let node = ProviderBuilder::new()
        .wallet(wallet)
        .connect_http(url.parse().expect("a URL"));
    let socket = ProviderBuilder::new()
        .connect_ws(WsConnect::new(url.replacen("http", "ws", 1)))
        .await
        .expect("a WebSocket");

    // Subscribe before anything happens.
    let mut blocks = socket
        .subscribe_blocks()
        .await
        .expect("newHeads")
        .into_stream();

    // Deploy: both implementations, and DstackKms behind its proxy. The wallet signs here.
    let mut created = Vec::new();
    for name in ["DstackApp", "DstackKms"] {
        let request =
            TransactionRequest::default().with_deploy_code(code(format!("{folder}/{name}.json")));
        let receipt = node
            .send_transaction(request)
            .await
            .expect(name)
            .get_receipt()
            .await
            .expect("a receipt");
        assert!(receipt.status());
        created.push(receipt.contract_address.expect("an address"));
    }
    let setup = Kms::initializeCall {
        initialOwner: owner,
        implementation: created[0],
    }
    .abi_encode();
    let arguments_of_proxy =
        alloy::sol_types::SolValue::abi_encode_params(&(created[1], Bytes::from(setup)));
    let proxy = [
        code(format!("{folder}/../ERC1967Proxy.json")).to_vec(),
        arguments_of_proxy,
    ]
    .concat();
    let request = TransactionRequest::default().with_deploy_code(proxy);
    let receipt = node
        .send_transaction(request)
        .await
        .expect("proxy")
        .get_receipt()
        .await
        .expect("a receipt");
    let kms = Kms::new(receipt.contract_address.expect("an address"), &node);
    assert_eq!(kms.owner().call().await.expect("owner"), owner);
    println!("deployed");

    let first = blocks.next().await.expect("a block");
    let stored = node
        .get_block(BlockId::number(first.number))
        .full()
        .await
        .expect("a block")
        .expect("it exists");
    assert_eq!(
        (stored.header.hash, stored.header.inner.hash_slow()),
        (first.hash, first.hash)
    );
    println!("subscribed to blocks; the hash of a header is that of its RLP");

    // Send, wait for a receipt, and read an event from it.
    let subscription = Filter::new()
        .address(*kms.address())
        .event_signature(Kms::OsImageHashAdded::SIGNATURE_HASH);
    let mut logs = socket
        .subscribe_logs(&subscription)
        .await
        .expect("logs")
        .into_stream();
    let pending = kms.addOsImageHash(IMAGE).send().await.expect("sent");
    let receipt = pending
        .with_timeout(Some(Duration::from_secs(20)))
        .get_receipt()
        .await
        .expect("a receipt");
    let event = receipt
        .decoded_log::<Kms::OsImageHashAdded>()
        .expect("the event");
    assert_eq!(event.osImageHash, IMAGE);
    assert!(kms.allowedOsImages(IMAGE).call().await.expect("a view"));
    let told = logs.next().await.expect("a log");
    assert_eq!(
        (
            told.transaction_hash,
            told.log_decode::<Kms::OsImageHashAdded>()
                .expect("the event")
                .inner
                .osImageHash
        ),
        (Some(receipt.transaction_hash), IMAGE)
    );
    println!("sent, waited for the receipt, and was told of the log");

    // The factory, and a contract that it made.
    let call = kms.deployAndRegisterApp(owner, false, false, true, B256::ZERO, B256::ZERO);
    let expected = call.call().await.expect("simulated");
    let receipt = call
        .send()
        .await
        .expect("sent")
        .get_receipt()
        .await
        .expect("a receipt");
    let app = receipt
        .decoded_log::<Kms::AppDeployedViaFactory>()
        .expect("the event")
        .appId;
    assert_eq!(app, expected);
    assert!(kms.registeredApps(app).call().await.expect("a view"));
    let contract = App::new(app, &node);
    contract
        .addComposeHash(COMPOSE_HASH)
        .send()
        .await
        .expect("sent")
        .watch()
        .await
        .expect("mined");
    assert!(contract
        .allowedComposeHashes(COMPOSE_HASH)
        .call()
        .await
        .expect("a view"));
    println!("deployed an app through the factory");

    // Filter logs, by address, topic and range, and by the contract's own filter.
    let filter = Filter::new()
        .address(app)
        .event("ComposeHashAdded(bytes32)")
        .from_block(0);
    let found = node.get_logs(&filter).await.expect("logs");
    assert_eq!(found.len(), 1);
    assert_eq!(
        found[0]
            .log_decode::<App::ComposeHashAdded>()
            .expect("the event")
            .inner
            .composeHash,
        COMPOSE_HASH
    );
    let deployed = kms
        .AppDeployedViaFactory_filter()
        .from_block(0)
        .topic1(app)
        .query()
        .await
        .expect("logs");
    assert_eq!((deployed.len(), deployed[0].0.deployer), (1, owner));
    assert!(node
        .get_logs(&filter.clone().to_block(1))
        .await
        .expect("logs")
        .is_empty());
    println!("filtered logs");

    // A custom error, from a call, from an estimate, and from a transaction.
    for refused in [
        kms.removeOsImageHash(IMAGE)
            .from(other)
            .call()
            .await
            .err()
            .expect("refused"),
        kms.removeOsImageHash(IMAGE)
            .from(other)
            .estimate_gas()
            .await
            .err()
            .expect("refused"),
        kms.removeOsImageHash(IMAGE)
            .from(other)
            .send()
            .await
            .err()
            .expect("refused"),
    ] {
        let decoded = refused
            .as_decoded_error::<Kms::OwnableUnauthorizedAccount>()
            .expect("the custom error");
        assert_eq!(decoded.account, other);
    }
    println!("decoded a custom error");

    // A transaction that fails when it is mined, an earlier state, fees, receipts of a block, storage.
    let nonce = node.get_transaction_count(other).await.expect("a count");
    let failing = kms
        .removeOsImageHash(IMAGE)
        .from(other)
        .gas(200_000)
        .nonce(nonce)
        .send()
        .await
        .expect("sent");
    let receipt = failing.get_receipt().await.expect("a receipt");
    assert!(!receipt.status());
    let before = receipt.block_number.expect("a number");
    kms.removeOsImageHash(IMAGE)
        .send()
        .await
        .expect("sent")
        .get_receipt()
        .await
        .expect("a receipt");
    assert!(!kms.allowedOsImages(IMAGE).call().await.expect("a view"));
    assert!(kms
        .allowedOsImages(IMAGE)
        .block(BlockId::number(before))
        .call()
        .await
        .expect("a view"));
    let history = node
        .get_fee_history(4, BlockNumberOrTag::Latest, &[25.0])
        .await
        .expect("fees");
    assert_eq!(history.base_fee_per_gas.len(), 5);
    let sent = node
        .get_transaction_by_hash(receipt.transaction_hash)
        .await
        .expect("a transaction")
        .expect("it exists");
    assert_eq!(sent.inner.signer(), other);
    assert!(node
        .get_transaction_receipt(B256::ZERO)
        .await
        .expect("an answer")
        .is_none());
    let receipts = node
        .get_block_receipts(BlockId::number(before))
        .await
        .expect("receipts")
        .expect("they exist");
    assert_eq!(receipts.len(), 1);
    let slot = U256::from_str_radix(
        "360894a13ba1a3210667c828492db98dca3e2076cc3735a920a3ca505d382bbc",
        16,
    )
    .expect("hex");
    let implementation = node
        .get_storage_at(*kms.address(), slot)
        .await
        .expect("a slot");
    assert_eq!(Address::from_word(implementation.into()), created[1]);
    println!("read earlier states, fees, transactions, receipts and storage");

    // The methods of anvil.
    let snapshot = node.anvil_snapshot().await.expect("a snapshot");
    let stranger = Address::repeat_byte(0x77);
    node.anvil_set_balance(stranger, U256::from(10).pow(U256::from(18)))
        .await
        .expect("a balance");
    node.anvil_impersonate_account(stranger)
        .await
        .expect("impersonation");
    let plain = ProviderBuilder::new().connect_http(url.parse().expect("a URL"));
    let request = TransactionRequest::default()
        .with_from(stranger)
        .with_to(other)
        .with_value(U256::from(5));
    let receipt = plain
        .send_transaction(request)
        .await
        .expect("sent")
        .get_receipt()
        .await
        .expect("a receipt");
    assert_eq!(receipt.from, stranger);
    node.anvil_mine(Some(3), None).await.expect("mined");
    assert!(node.anvil_revert(snapshot).await.expect("reverted"));
    assert!(node
        .get_balance(stranger)
        .await
        .expect("a balance")
        .is_zero());
    println!("used anvil's methods");
}
