// Conversions of float16 to float32 and back, and of rows to length 1.

#pragma once

#include "inner_products.h"

#include <cmath>
#include <cstdint>

namespace {

constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

void convert(const uint16_t* values, int64_t count, float* results) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(results + i, Half::eight(values + i));
    for (; i < count; ++i) results[i] = Half::one(values[i]);
}

void convert(const float* values, int64_t count, uint16_t* results) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i*)(results + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), NEAREST));
    for (; i < count; ++i) results[i] = _cvtss_sh(values[i], NEAREST);
}

constexpr float MIN_LENGTH = 1e-15f, MAX_LENGTH = 1e15f; // the square of a length between them fits in float32

// Writes a row divided by its length. Returns whether the length is between MIN_LENGTH and MAX_LENGTH.
bool to_unit(const float* row, int64_t dim, float* unit) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= dim; i += 32)
        for (int64_t j = 0; j < 4; ++j) {
            const __m256 values = _mm256_loadu_ps(row + i + 8 * j);
            sums[j] = _mm256_fmadd_ps(values, values, sums[j]);
        }
    float total = sum(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    for (; i < dim; ++i) total += row[i] * row[i];
    const float length = std::sqrt(total);
    for (i = 0; i < dim; ++i) unit[i] = row[i] / length;
    return length > MIN_LENGTH && length < MAX_LENGTH;
}

} // namespace
