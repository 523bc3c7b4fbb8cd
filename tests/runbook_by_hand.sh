# The KMS authorization runbook by hand, on a stack without keys: curl, two policy files, and every answer in a file.
#
# Runs in the folder that holds the two policies, auth-src.json and auth-dst.json. KMS_SRC and KMS_DST are the hosts and
# ports of the two KMS, KMS_SOURCE the URL of the first one as the second one reaches it, if that is another.

call() { # call NAME URL BODY: POST the body and keep the answer in NAME.json
  curl -sk -X POST "$2?json" -H 'Content-Type: application/json' -d "$3" -o "$1.json"
}

field() { # field NAME KEY: print a text field of NAME.json
  sed -n "s/.*\"$2\":\"\([^\"]*\)\".*/\1/p" "$1.json"
}

policy() { # policy SIDE IMAGES MEASUREMENTS: replace a webhook's policy; it applies to the next request
  printf '{"osImages":[%s],"gatewayAppId":"any","kms":{"mrAggregated":[%s],"devices":[],"allowAnyDevice":true},"apps":{}}' \
    "$2" "$3" >"auth-$1.json.new"
  mv "auth-$1.json.new" "auth-$1.json"
}

until_serving() { # until_serving HOST:PORT: wait for the runtime phase, which has TLS
  until curl -skf "https://$1/prpc/KMS.GetMeta" -o /dev/null; do :; done
}

onboard_src="http://$KMS_SRC/prpc" onboard_dst="http://$KMS_DST/prpc"
runtime_src="https://$KMS_SRC/prpc" runtime_dst="https://$KMS_DST/prpc"

# Preparation: who the two KMS are.
call kms-src-attestation "$onboard_src/Onboard.GetAttestationInfo" '{}'
call kms-dst-attestation "$onboard_dst/Onboard.GetAttestationInfo" '{}'
src_image="\"0x$(field kms-src-attestation os_image_hash)\"" src="\"0x$(field kms-src-attestation mr_aggregated)\""
dst_image="\"0x$(field kms-dst-attestation os_image_hash)\"" dst="\"0x$(field kms-dst-attestation mr_aggregated)\""
nobody="\"0x$(printf '0%.0s' $(seq 64))\""

# Case 1: a KMS whose own policy denies it does not bootstrap.
policy src "$src_image" "$nobody"
call bootstrap-src-denied "$onboard_src/Onboard.Bootstrap" '{"domain":"kms-src.example"}'

# Case 2: it bootstraps once it is allowed, and serves.
policy src "$src_image" "$src"
call bootstrap-src-allowed "$onboard_src/Onboard.Bootstrap" '{"domain":"kms-src.example"}'
curl -s "http://$KMS_SRC/finish" -o /dev/null
until_serving "$KMS_SRC"
call kms-src-meta "$runtime_src/KMS.GetMeta" '{}'

# Case 3: the receiver takes no keys of a source that its policy denies.
onboard="{\"source_url\":\"${KMS_SOURCE:-$runtime_src}\",\"domain\":\"kms-dst.example\"}"
policy src "$src_image,$dst_image" "$src,$dst"
policy dst "$src_image" "$nobody"
call onboard-dst-denied "$onboard_dst/Onboard.Onboard" "$onboard"
policy dst "$src_image" "$src"
call onboard-dst-allowed "$onboard_dst/Onboard.Onboard" "$onboard"
curl -s "http://$KMS_DST/finish" -o /dev/null
until_serving "$KMS_DST"
call kms-dst-meta "$runtime_dst/KMS.GetMeta" '{}'

# Case 4: a KMS that its policy denies answers no trusted call.
call get-temp-ca-allowed "$runtime_src/KMS.GetTempCaCert" '{}'
policy src "$src_image" "$nobody"
call get-temp-ca-denied "$runtime_src/KMS.GetTempCaCert" '{}'
