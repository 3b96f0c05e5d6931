// Number formats: conversions between bits and values, each rounded once, to nearest even.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

template <class To, class From> static inline To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
static inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
static inline float from_half(u16 x) { return (float)as<_Float16>(x); }
static inline u16 to_half(double x) { return as<u16>((_Float16)x); }
static inline float from_bfloat(u16 x) { return as<float>((u32)x << 16); }
static inline float to_odd(double x) {  // so that one more rounding is the only one
  float f = (float)x;
  if (f != f || std::isinf(f) || (double)f == x) return f;
  return as<float>((as<u32>(f) - (std::fabs((double)f) > std::fabs(x))) | 1);
}
static inline u16 to_bfloat(double x) {
  u32 bits = as<u32>(to_odd(x));
  return x != x ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline float from_e4m3(u8 code) {
  int exponent = code >> 3 & 15, mantissa = code & 7;
  float value = exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp((float)mantissa, -9);
  if (exponent == 15 && mantissa == 7) value = NAN;
  return code >> 7 ? -value : value;
}
static inline float from_tf32(u32 x) { return as<float>(x & 0xffffe000u); }

template <class T> static inline T least(T a, T b) {  // of PTX's min: a number beside NaN, and -0 before 0
  if (a != a) return b;
  if (b != b) return a;
  return a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
static inline u32 bits(u32 a, u32 first, u32 n) {
  if (!n || first > 31) return 0;
  return n > 31 ? a >> first : a >> first & ((1u << n) - 1);
}
static inline u32 signed_bits(u32 a, u32 first, u32 n) {
  if (!n) return 0;
  u32 sign = a >> (first + n - 1 < 31 ? first + n - 1 : 31) & 1, kept = first > 31       ? 0
                                                                        : n < 32 - first ? n
                                                                                         : 32 - first;
  u32 field = bits(a, first, kept);
  return sign && kept < 32 ? field | ~0u << kept : field;
}
static inline u32 permuted(u32 a, u32 b, u32 selector) {
  u64 both = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 nibble = selector >> 4 * i & 15, byte = both >> 8 * (nibble & 7) & 255;
    result |= (nibble & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return result;
}
