//! Plugin configurations from untrusted bytes: never a panic, and what is accepted is in the documented
//! ranges and says what the document says.

use driftlock_engine::calibrate::messages_for_alpha;
use driftlock_inspect::config::{Config, ConfigError};
use serde_json::Value;

/// See the module.
pub fn holds(data: &[u8]) {
    let parsed = Config::parse(data);
    assert_eq!(parsed, Config::parse(data), "parsing depends on nothing else");
    match parsed {
        Ok(config) => accepted(&config, data),
        Err(ConfigError::Field { path, reason }) => assert!(!path.is_empty() && !reason.is_empty()),
        Err(error) => assert!(error.to_string().starts_with("plugin configuration"), "{error}"),
    }
}

fn accepted(config: &Config, data: &[u8]) {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    assert!((1..=64).contains(&config.name.len()) && config.name.bytes().all(plain), "{:?}", config.name);
    let settings = &config.settings;
    assert!((1..=500_000).contains(&settings.alpha_ppm), "alpha {} ppm", settings.alpha_ppm);
    assert!(config.max_body_bytes >= 1024);
    assert!(settings.max_streams >= 1);
    let training = &settings.training;
    assert!(training.max_ngrams >= 1024 && training.max_table_bytes >= 32 << 10);
    assert!(training.max_unit_bytes >= 64);

    let least = messages_for_alpha(settings.alpha_ppm);
    assert!(
        settings.learning.is_some() || !config.snapshot.streams().is_empty(),
        "nothing could ever be judged"
    );
    for baseline in config.snapshot.streams() {
        assert!(baseline.calibration().statistics().len() >= least as usize);
    }
    let document: Value = if data.trim_ascii().is_empty() {
        Value::Object(Default::default())
    } else {
        serde_json::from_slice(data).expect("what is accepted is JSON")
    };
    let stated = |path: &str, default: u64| document.pointer(path).map_or(default, |v| v.as_u64().unwrap());
    assert_eq!(config.max_body_bytes, stated("/limits/max_body_bytes", 16 << 20));
    assert_eq!(settings.max_streams as u64, stated("/limits/max_streams", 64));
    if let Some(plan) = settings.learning {
        assert!(plan.calibrate >= least && plan.train >= 10, "{plan:?}");
        assert_eq!(u64::from(plan.messages()), stated("/learn/messages", 1000));
    }
}
