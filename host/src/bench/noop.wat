;; The filter that Driftlock's is measured against in Envoy: it lets headers pass, has both bodies
;; buffered, reads each whole, and does nothing with them. With any plugin configuration it holds nothing:
;; it reads what comes and lets it pass, as a filter of streams has to. Proxy-wasm ABI 0.2.1.
(module
  (import "env" "proxy_get_buffer_bytes"
    (func $get_buffer_bytes (param $buffer i32) (param $start i32) (param $max i32)
      (param $out i32) (param $out_size i32) (result i32)))
  ;; Page 0: where the host writes an address and a length. From page 1: the body.
  (memory (export "memory") 2)
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "proxy_on_memory_allocate") (param $size i32) (result i32)
    (local $missing i32)
    (local.set $missing
      (i32.sub
        (i32.add (i32.const 2) (i32.shr_u (local.get $size) (i32.const 16)))
        (memory.size)))
    (if (i32.gt_s (local.get $missing) (i32.const 0))
      (then (drop (memory.grow (local.get $missing)))))
    (i32.const 65536))
  (func (export "proxy_on_context_create") (param i32 i32))
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.const 1))
  (global $holds (mut i32) (i32.const 1))
  (func (export "proxy_on_configure") (param $context i32) (param $size i32) (result i32)
    (global.set $holds (i32.eqz (local.get $size)))
    (i32.const 1))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (i32.const 0))
  (func $body (param $buffer i32) (param $size i32) (param $end i32) (result i32)
    ;; Pause until all of it is there.
    (if (i32.and (global.get $holds) (i32.eqz (local.get $end))) (then (return (i32.const 1))))
    (drop
      (call $get_buffer_bytes (local.get $buffer) (i32.const 0) (local.get $size)
        (i32.const 0) (i32.const 4)))
    (i32.const 0))
  (func (export "proxy_on_request_body") (param $context i32) (param $size i32) (param $end i32) (result i32)
    (call $body (i32.const 0) (local.get $size) (local.get $end)))
  (func (export "proxy_on_response_body") (param $context i32) (param $size i32) (param $end i32) (result i32)
    (call $body (i32.const 1) (local.get $size) (local.get $end)))
  (func (export "proxy_on_done") (param i32) (result i32) (i32.const 1))
  (func (export "proxy_on_log") (param i32))
  (func (export "proxy_on_delete") (param i32)))
