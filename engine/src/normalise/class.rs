//! The kinds of token, and sets of them.

/// What a token is. The order is the order of precedence where two would start at the same byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Class {
    /// A private key in PEM (RFC 7468): from `BEGIN … PRIVATE KEY-----` to the end of the last line.
    PrivateKey,
    /// User information with a password in a URL (RFC 3986, section 3.2.1), or the credentials of a
    /// `Basic` challenge (RFC 7617).
    Password,
    /// What follows `Bearer` (RFC 6750).
    Bearer,
    /// A key with its issuer's prefix: OpenAI, Anthropic, AWS, Google, GitHub, Slack, Stripe and others.
    ApiKey,
    /// A JSON Web Token (RFC 7519) in compact form.
    Jwt,
    /// A mail address.
    Email,
    /// A W3C `traceparent`.
    Traceparent,
    /// A UUID (RFC 9562) with its hyphens.
    Uuid,
    /// A date, or date and time, of ISO 8601 / RFC 3339.
    Timestamp,
    /// The date and time of HTTP (RFC 9110, section 5.6.7), without the day's name.
    HttpDate,
    /// An IBAN (ISO 13616) with the length of its country and right check digits.
    Iban,
    /// An IPv4 or IPv6 address.
    IpAddress,
    /// A payment card number (ISO/IEC 7812): 13 to 19 digits with a right Luhn digit.
    Card,
    /// A telephone number: international with `+`, or North American with its usual separators.
    Phone,
    /// Seconds or milliseconds since 1970, of 2001 or later.
    Epoch,
    /// An identifier with a known prefix (`chatcmpl-`, `req_`, `call_`), or a ULID.
    Id,
    /// At least 16 hexadecimal digits.
    Hex,
    /// At least 6 decimal digits.
    Digits,
    /// At least 32 characters of base64 that look random.
    Base64,
}

impl Class {
    /// All classes, by precedence.
    pub const ALL: [Self; 19] = [
        Self::PrivateKey,
        Self::Password,
        Self::Bearer,
        Self::ApiKey,
        Self::Jwt,
        Self::Email,
        Self::Traceparent,
        Self::Uuid,
        Self::Timestamp,
        Self::HttpDate,
        Self::Iban,
        Self::IpAddress,
        Self::Card,
        Self::Phone,
        Self::Epoch,
        Self::Id,
        Self::Hex,
        Self::Digits,
        Self::Base64,
    ];

    /// As in `[REDACTED:name]` and in configurations.
    pub const fn name(self) -> &'static str {
        let marker = self.redaction();
        // Between the colon and the bracket.
        match marker.split_at_checked(10) {
            Some((_, rest)) => match rest.split_at_checked(rest.len().saturating_sub(1)) {
                Some((name, _)) => name,
                None => rest,
            },
            None => marker,
        }
    }

    /// What a redacted token leaves behind: no byte of it needs an escape in JSON, HTML or a URL path.
    pub const fn redaction(self) -> &'static str {
        match self {
            Self::PrivateKey => "[REDACTED:private_key]",
            Self::Password => "[REDACTED:password]",
            Self::Bearer => "[REDACTED:bearer]",
            Self::ApiKey => "[REDACTED:api_key]",
            Self::Jwt => "[REDACTED:jwt]",
            Self::Email => "[REDACTED:email]",
            Self::Traceparent => "[REDACTED:traceparent]",
            Self::Uuid => "[REDACTED:uuid]",
            Self::Timestamp => "[REDACTED:timestamp]",
            Self::HttpDate => "[REDACTED:http_date]",
            Self::Iban => "[REDACTED:iban]",
            Self::IpAddress => "[REDACTED:ip_address]",
            Self::Card => "[REDACTED:card]",
            Self::Phone => "[REDACTED:phone]",
            Self::Epoch => "[REDACTED:epoch]",
            Self::Id => "[REDACTED:id]",
            Self::Hex => "[REDACTED:hex]",
            Self::Digits => "[REDACTED:digits]",
            Self::Base64 => "[REDACTED:base64]",
        }
    }

    /// The letter of the marker that stands for a token while it is scored.
    pub(crate) const fn letter(self) -> u8 {
        b'a' + self as u8
    }
}

/// A set of classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClassSet(u32);

impl ClassSet {
    /// No class.
    pub const NONE: Self = Self(0);
    /// Every class.
    pub const ALL: Self = Self((1 << Class::ALL.len()) - 1);
    /// What gives access: keys, tokens, passwords.
    pub const SECRETS: Self = Self::NONE
        .with(Class::PrivateKey)
        .with(Class::Password)
        .with(Class::Bearer)
        .with(Class::ApiKey)
        .with(Class::Jwt);
    /// What names a person or an account.
    pub const PERSONAL: Self = Self::NONE
        .with(Class::Email)
        .with(Class::Iban)
        .with(Class::IpAddress)
        .with(Class::Card)
        .with(Class::Phone);
    /// What is different in every message and means nothing.
    pub const VOLATILE: Self = Self::NONE
        .with(Class::Jwt)
        .with(Class::Traceparent)
        .with(Class::Uuid)
        .with(Class::Timestamp)
        .with(Class::HttpDate)
        .with(Class::Epoch)
        .with(Class::Id)
        .with(Class::Hex)
        .with(Class::Digits)
        .with(Class::Base64);
    /// What must not leave the process: secrets and personal data.
    pub const REDACTED: Self = Self(Self::SECRETS.0 | Self::PERSONAL.0);

    /// With `class` too.
    pub const fn with(self, class: Class) -> Self {
        Self(self.0 | 1 << class as u32)
    }

    /// Without `class`.
    pub const fn without(self, class: Class) -> Self {
        Self(self.0 & !(1 << class as u32))
    }

    /// What is in either.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The set as one number: bit n is the nth of [`Class::ALL`].
    pub(crate) const fn bits(self) -> u32 {
        self.0
    }

    /// The set of a number; none if it names a class that is not known here.
    pub(crate) const fn from_bits(bits: u32) -> Option<Self> {
        if bits & !Self::ALL.0 == 0 { Some(Self(bits)) } else { None }
    }

    /// What is in both.
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether each class of `other` is in it.
    pub const fn contains_all(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// Whether any class is in both.
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether `class` is in it.
    pub const fn contains(self, class: Class) -> bool {
        self.0 & (1 << class as u32) != 0
    }
}
