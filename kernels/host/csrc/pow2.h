// Coefficients of 2^f. Minimax fits of the relative error; the constant term of the first is 1, so that 2^0 is 1.
#pragma once

namespace baton {
namespace {

// f in [-0.5, 0.5]: relative error 2.0e-9, before rounding.
constexpr float kPow2[7] = {1.0f,           0.69314718246f,  0.24022647738f,  0.05550332367f,
                            0.00961843692f, 0.001339887502f, 0.00015353362f};
// Below this an fp32 exponent ends: weights there are exactly 0.
constexpr float kLeastPow2 = -126.0f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.693359375f;  // 355 / 512: times a small whole number it is exact
constexpr float kLn2Rest = -2.12194440e-4f;

}  // namespace
}  // namespace baton
